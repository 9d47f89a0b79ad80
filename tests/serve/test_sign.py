"""Signed pictures: every output verifies, any changed byte does not, and nothing of the picture is lost."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo
from tests.generate.conftest import lively, run
from tests.weights.tiny import tiny

from sumuk.base.errors import BadFile, MissingExtra, SumukError
from sumuk.generate.receipt import read_receipt, write_png
from sumuk.generate.replay import replay, request_of
from sumuk.serve.sign import DRAWN, DRAWN_ON, sealer, verify
from sumuk.serve.trouble import Refused
from sumuk.weights.model import Model

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def named(text: str) -> x509.Name:
    said = ((NameOID.ORGANIZATION_NAME, "Sumuk test"), (NameOID.COMMON_NAME, text))
    return x509.Name([x509.NameAttribute(what, value) for what, value in said])


def usage(**yes: bool) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{each: yes.get(each, False) for each in every})


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def chain(folder: Path, key: Any = None, purpose: Any = None, days: int = 30) -> str:
    """Write ``cert.pem`` and ``key.pem`` of a signer and its own small authority; the authority as PEM."""
    folder.mkdir(exist_ok=True)
    above, own = ec.generate_private_key(ec.SECP256R1()), key or ec.generate_private_key(ec.SECP256R1())

    def made(subject: str, public: Any, ends: datetime.datetime, *extensions: Any) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named("authority"))
        builder = builder.public_key(public).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(NOW - 40 * DAY).not_valid_after(ends)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(above, hashes.SHA256())

    authority = made(
        "authority", above.public_key(), NOW + 90 * DAY,
        (x509.BasicConstraints(True, None), True), (usage(key_cert_sign=True, crl_sign=True), True),
        (x509.SubjectKeyIdentifier.from_public_key(above.public_key()), False),
    )  # fmt: skip
    signer = made(
        "signer", own.public_key(), NOW + days * DAY,
        (x509.BasicConstraints(False, None), True), (usage(digital_signature=True), True),
        (x509.ExtendedKeyUsage([purpose or ExtendedKeyUsageOID.EMAIL_PROTECTION]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(above.public_key()), False),
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(pem(signer) + pem(authority))
    (folder / "key.pem").write_bytes(
        own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pem(authority).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signing") / "credentials"


@pytest.fixture(scope="module")
def authority(folder: Path) -> str:
    return chain(folder)


@pytest.fixture(scope="module")
def drawn(model: Model) -> dict[str, bytes]:
    """What the engine draws, as the files that a server would keep."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    photo = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    asked = {
        "plain": {"prompt": "여우, (3d:1.2)", "seed": 3},
        "markup": {"prompt": "<script>alert(1)</script> \\ \" '", "negative": "\u202e\U0001f98a"},
        "from a picture": {"prompt": "a fox", "init": photo, "strength": 0.5},
        "three": {"prompt": "a fox", "count": 3},
    }
    files = {}
    for name, pictures in zip(asked, run(model, *asked.values()), strict=True):
        for number, finished in enumerate(pictures):
            file = io.BytesIO()
            write_png(finished.picture, finished.receipt, file)
            files[f"{name} {number}"] = file.getvalue()
    torch.set_num_threads(before)
    return files


@pytest.fixture(scope="module")
def model() -> Model:
    return lively(tiny())


def signed(folder: Path, *pngs: bytes) -> list[bytes]:
    """All of them at once, as a server would."""

    async def all_of_them() -> list[bytes]:
        seal = sealer(folder)
        return list(await asyncio.gather(*map(seal, pngs)))

    return asyncio.run(all_of_them())


def chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's name, and where it begins and ends."""
    at = 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        yield png[at + 4 : at + 8], at, end
        at = end


def test_every_output_verifies(folder: Path, authority: str, drawn: dict[str, bytes]) -> None:
    made = signed(folder, *drawn.values())
    for name, png in zip(drawn, made, strict=True):
        said = verify(png)
        assert (said["state"], said["problems"]) == ("valid", ["signingCredential.untrusted"]), name
        assert verify(png, authority)["state"] == "trusted"
        receipt = json.loads(Image.open(io.BytesIO(png)).info["sumuk"])
        assert (said["generator"], said["issuer"]) == ("Sumuk", "Sumuk test")
        assert said["title"] == "a picture drawn with Stable Diffusion 1.x"
        assert said["model"] == {
            "title": "Stable Diffusion 1.x", "family": "sd1/text-to-image", "licence": receipt["licence"],
        }  # fmt: skip
        assert said["source"] == (DRAWN_ON if name.startswith("from a picture") else DRAWN)
    assert len(made) == 6
    assert {verify(png)["state"] for png in drawn.values()} == {"none"}


def test_nothing_of_the_picture_is_lost(
    folder: Path, authority: str, drawn: dict[str, bytes], model: Model, tmp_path: Path
) -> None:
    before = drawn["plain 0"]
    (after,) = signed(folder, before)
    kept = [after[start:end] for name, start, end in chunks(after) if name != b"caBX"]
    assert kept == [before[start:end] for _, start, end in chunks(before)], (
        "one chunk more, and else as it was"
    )
    path = tmp_path / "signed.png"
    path.write_bytes(after)
    picture, receipt = read_receipt(path)
    torch.set_num_threads(1)
    assert replay(picture, receipt, model, request_of(receipt, {})).kind == "identical"


def test_any_changed_byte_is_seen(folder: Path, authority: str) -> None:
    """Every byte of a small file; also when whoever changes it mends the checksums."""
    info = PngInfo()
    info.add_itxt("parameters", "a fox")
    file = io.BytesIO()
    Image.effect_noise((8, 8), 50).save(file, "PNG", pnginfo=info)
    (png,) = signed(folder, file.getvalue())
    meant = verify(png)
    for at in range(len(png)):
        assert verify(changed(png, at))["state"] == "invalid", at
    silent = 0
    for name, start, end in chunks(png):
        for at in range(start, end - 4, 7 if name == b"caBX" else 1):
            mended = changed(png, at)
            mended = mended[: end - 4] + zlib.crc32(mended[start + 4 : end - 4]).to_bytes(4) + mended[end:]
            said = verify(mended)
            if said["state"] == "valid":
                assert name == b"caBX" and said == meant, (name, at - start)
                silent += 1
    assert silent, "the manifest has padding that nothing reads; if that is gone, this test may be stricter"


def changed(png: bytes, at: int) -> bytes:
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def test_cut_and_prolonged(folder: Path, authority: str, drawn: dict[str, bytes]) -> None:
    (png,) = signed(folder, drawn["plain 0"])
    for other in (b"", png[:20], png[:-1], png[:-12], png + b"x", png[8:], b"\xff\xd8\xff" + png):
        assert verify(other) == {"state": "invalid", "problems": ["png.damaged"]}
    with Image.open(io.BytesIO(png)) as image:
        file = io.BytesIO()
        image.save(file, "PNG")
    assert verify(file.getvalue())["state"] == "none", "saved again by others, it has no manifest"


@pytest.mark.parametrize("kind", ["p384", "rsa", "ed25519"])
def test_other_keys(kind: str, tmp_path: Path, drawn: dict[str, bytes]) -> None:
    key = {
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }[kind]()
    trusted = chain(tmp_path / "c", key)
    (png,) = signed(tmp_path / "c", drawn["plain 0"])
    assert verify(png, trusted)["state"] == "trusted"
    assert (
        ImageChops.difference(*(Image.open(io.BytesIO(each)) for each in (png, drawn["plain 0"]))).getbbox()
        is None
    )


def refusal(folder: Path) -> str:
    with pytest.raises(SumukError) as caught:
        sealer(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and len(line) < 500
    return line


def test_credentials_that_cannot_sign_are_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    assert "there is no cert.pem" in refusal(folder)
    chain(folder)
    (folder / "key.pem").rename(folder / "old.pem")
    assert "there is no key.pem" in refusal(folder)
    (folder / "key.pem").write_text("secret")
    line = refusal(folder)
    assert "holds no PEM key" in line and "secret" not in line
    chain(tmp_path / "other")
    (folder / "key.pem").write_bytes((tmp_path / "other" / "key.pem").read_bytes())
    assert "is not that of" in refusal(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    sealed = serialization.BestAvailableEncryption(b"word")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (folder / "key.pem").write_bytes(key.private_bytes(*form, sealed))
    assert "has a password" in refusal(folder)
    (folder / "key.pem").write_bytes(
        ec.generate_private_key(ec.SECP256K1()).private_bytes(*form, serialization.NoEncryption())
    )
    assert "of a kind that C2PA does not sign with" in refusal(folder)
    (folder / "cert.pem").write_text("nothing")
    assert "holds no PEM certificate" in refusal(folder)
    for purpose, days, told in (
        (None, -1, "not valid at time of signing"),
        (ExtendedKeyUsageOID.SERVER_AUTH, 30, "the certificate is invalid"),
        (ExtendedKeyUsageOID.CODE_SIGNING, 30, "the certificate is invalid"),
    ):
        chain(folder, purpose=purpose, days=days)
        assert told in refusal(folder)


def test_a_picture_that_cannot_be_signed_is_withheld(folder: Path, authority: str) -> None:
    with pytest.raises(Refused) as caught:
        signed(folder, b"no picture")
    assert caught.value.trouble.status == 500 and "withheld" in str(caught.value)


def test_without_the_package(folder: Path, authority: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sumuk\[sign\]'"):
        sealer(folder)
    with pytest.raises(MissingExtra):
        verify(b"")


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """A picture may say that its manifest lies at an address; that is not asked."""
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *told: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        info = PngInfo()
        info.add_itxt(
            "XML:com.adobe.xmp",
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
            f'dcterms:provenance="http://127.0.0.1:{server.server_port}/manifest.c2pa"/></rdf:RDF></x:xmpmeta>',
        )
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
        said = verify(file.getvalue())
        server.shutdown()
        thread.join()
    assert asked == [] and said["state"] == "invalid" and said["problems"] == ["Remote"]


def test_damage_has_a_code(tmp_path: Path) -> None:
    chain(tmp_path / "c", days=-1)
    with pytest.raises(BadFile) as caught:
        sealer(tmp_path / "c")
    assert caught.value.code == "sign.credentials"

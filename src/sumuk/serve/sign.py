"""Content credentials: pictures signed so that anyone can tell what made them, and that nothing was changed since.

A C2PA manifest is put into the PNG as one chunk more: that a trained model made it, which one, under which licence,
signed with the operator's certificate. The texts of the PNG stay, and are covered by the signature as its pixels are. A
manifest does not outlive a screenshot or a conversion: that it is absent means nothing.

No timestamp is fetched, so that a signature counts as long as the certificate does; nor is anything else, neither when
signing nor when checking.

Source: C2PA technical specification 2.2, https://c2pa.org/specifications/; IPTC's digital source types.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from sumuk.base.errors import BadFile, BadInput, MissingExtra, MissingFile
from sumuk.serve.trouble import refused

log = logging.getLogger("sumuk.serve")

CERTIFICATE, KEY = "cert.pem", "key.pem"
MODEL = "sumuk.model"
"""Label of the assertion that names the model and the licence of all its files."""
DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DRAWN_ON = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""Where it comes from: drawn from nothing, or from another picture."""
MEDIA = "image/png"
SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
"""Nothing is fetched, and the picture is not put into itself once more."""
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
SOUND = ("valid", "trusted")
"""States of credentials that hold."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"

Seal = Callable[[bytes], Awaitable[bytes]]


def sealer(folder: Path) -> Seal:
    """What signs pictures with the certificate and the key of a folder.

    ``cert.pem`` holds the chain, the signer's own certificate first, and ``key.pem`` its key without a password. Both
    are tried on a picture at once.

    Returns:
        Takes a whole PNG, returns it signed. It raises Refused if that fails: nothing is given out unsigned.

    Raises:
        MissingExtra: the package c2pa-python is not installed.
        MissingFile, BadFile, BadInput: the folder, or what is wrong with the files in it.
    """
    c2pa = _c2pa()
    chain, key, method = _credentials(folder)
    context = c2pa.Context.from_dict(SETTINGS)
    try:
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(method.encode(), chain, key, None))
    except c2pa.C2paError as error:
        raise _unfit(folder, error) from None

    def seal(png: bytes) -> bytes:
        signed = io.BytesIO()
        with c2pa.Builder(json.dumps(_manifest(png)), context=context) as builder:
            builder.sign(signer, MEDIA, io.BytesIO(png), signed)
        return signed.getvalue()

    _try(seal, folder)
    hand = ThreadPoolExecutor(1, "sumuk-sign")

    async def sealed(png: bytes) -> bytes:
        try:
            return await asyncio.get_running_loop().run_in_executor(hand, seal, png)
        except Exception:
            log.exception(
                "a picture cannot be signed, and is withheld; has the certificate in %s run out?", folder
            )
            raise refused("internal", "the picture cannot be signed, so that it is withheld") from None

    return sealed


def verify(png: bytes, anchors: str | None = None) -> dict[str, Any]:
    """What a PNG's content credentials say, and whether they hold.

    Args:
        png: the whole file.
        anchors: PEM certificates of authorities that are trusted; None: those that the C2PA library brings.

    Returns:
        ``state``: ``none``, ``invalid``, ``valid`` (nothing was changed since somebody signed it), ``trusted`` (and
        the signer's authority is known); ``problems``: C2PA's codes of what does not hold. Of those that hold also
        ``generator``, ``title``, ``issuer``, ``source`` (digital source type), and ``model`` if it is named.

    Raises:
        MissingExtra: the package c2pa-python is not installed.
    """
    c2pa = _c2pa()
    if not _is_whole(png):
        return {"state": "invalid", "problems": ["png.damaged"]}
    settings = SETTINGS if anchors is None else {**SETTINGS, "trust": {"user_anchors": anchors}}
    try:
        with c2pa.Context.from_dict(settings) as context:
            reader = c2pa.Reader.try_create(MEDIA, io.BytesIO(png), context=context)
            if reader is None:
                return {"state": "none", "problems": []}
            with reader:
                told = json.loads(reader.json())
    except c2pa.C2paError as error:
        return {"state": "invalid", "problems": [str(error).partition(":")[0]]}
    problems = [each["code"] for each in told.get("validation_status", ())]
    state = str(told.get("validation_state", "invalid")).lower()
    return {"state": state, "problems": problems, **(_said(told) if state in SOUND else {})}


def _said(told: dict[str, Any]) -> dict[str, Any]:
    manifest = told["manifests"][told["active_manifest"]]
    assertions = {each["label"]: each["data"] for each in manifest.get("assertions", ())}
    actions = assertions.get("c2pa.actions.v2", {}).get("actions", ())
    return {
        "generator": next((each.get("name") for each in manifest.get("claim_generator_info", ())), None),
        "title": manifest.get("title"),
        "issuer": manifest.get("signature_info", {}).get("issuer"),
        "source": next((each.get("digitalSourceType") for each in actions), None),
        "model": assertions.get(MODEL),
    }


def _c2pa() -> Any:
    try:
        import c2pa
        import cryptography  # noqa: F401  # it brings it along
    except ImportError:
        raise MissingExtra("signing pictures", "sign") from None
    return c2pa


def _is_whole(png: bytes) -> bool:
    """Whether every chunk has its checksum: the manifest's own padding is under no signature."""
    at = len(SIGNATURE)
    if not png.startswith(SIGNATURE):
        return False
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        if end > len(png) or zlib.crc32(png[at + 4 : end - 4]) != int.from_bytes(png[end - 4 : end]):
            return False
        if png[at + 4 : at + 8] == b"IEND":
            return end == len(png)
        at = end
    return False


def _manifest(png: bytes) -> dict[str, Any]:
    """What is claimed of a picture, from the receipt inside it."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        text = image.info.get("sumuk")  # it stands before the pixels, which are not decoded for it
    receipt = json.loads(text) if isinstance(text, str) else None
    software = {"name": "Sumuk", "version": version("sumuk")}
    other = receipt is not None and receipt["settings"].get("init") is not None
    created = {
        "action": "c2pa.created",
        "digitalSourceType": DRAWN_ON if other else DRAWN,
        "softwareAgent": software,
    }
    made: dict[str, Any] = {
        "claim_generator_info": [software],
        "title": "a picture",
        "format": MEDIA,
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}],
    }
    if receipt is not None:
        model = {key: receipt["model"][key] for key in ("title", "family")}
        made["title"] = f"a picture drawn with {model['title']}"
        made["assertions"].append({"label": MODEL, "data": {**model, "licence": receipt["licence"]}})
    return made


def _try(seal: Callable[[bytes], bytes], folder: Path) -> None:
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, "PNG")
    try:
        found = verify(seal(blank.getvalue()))
    except _c2pa().C2paError as error:
        raise _unfit(folder, error) from None
    if found["state"] not in SOUND:
        raise _unfit(folder, ", ".join(found["problems"]))


def _unfit(folder: Path, why: object) -> BadFile:
    return BadFile(
        f"{folder} cannot sign: {' '.join(str(why).split()):.200}; C2PA asks for a certificate that is valid now, was "
        "issued by another one, and is for digital signatures and e-mail protection",
        "sign.credentials",
    )


def _credentials(folder: Path) -> tuple[bytes, bytes, str]:
    """The chain and the key as PEM, and the method that goes with the key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    cert_file, key_file = folder / CERTIFICATE, folder / KEY
    for file in (cert_file, key_file):
        if not file.is_file():
            raise MissingFile(f"signing needs {CERTIFICATE} and {KEY} in {folder}; there is no {file.name}")
    try:
        chain = x509.load_pem_x509_certificates(cert_file.read_bytes())
    except (ValueError, OSError) as error:
        raise BadFile(f"{cert_file} holds no PEM certificate: {error!s:.200}", "sign.certificate") from None
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    except TypeError:
        raise BadInput(
            f"{key_file} has a password; take it away, and keep the file where others cannot read it"
        ) from None
    except (ValueError, OSError) as error:
        raise BadFile(f"{key_file} holds no PEM key: {error!s:.200}", "sign.key") from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        method = CURVES[key.curve.name]
    elif isinstance(key, rsa.RSAPrivateKey):
        method = "ps256"
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        method = "ed25519"
    else:
        raise BadFile(
            f"{key_file} holds a key of a kind that C2PA does not sign with; it takes P-256, P-384, P-521, "
            "Ed25519 and RSA",
            "sign.key",
        )
    if chain[0].public_key() != key.public_key():
        raise BadFile(f"the first certificate of {cert_file} is not that of {key_file}", "sign.key")
    return (
        b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        method,
    )

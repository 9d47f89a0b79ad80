"""Reading a run: what is unknown, out of range, no TOML or absent is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sumuk.base.errors import BadInput, MissingFile
from sumuk.train.config import TrainConfig, VaeRecipe, read_config
from sumuk.train.loop import fingerprint

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD = """
out = "out"
images = 100
batch = 4
[data]
root = "pictures"
size = 16
[recipe]
kind = "vae"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def test_a_good_file(write):
    config = read_config(write(GOOD))
    assert (config.out, config.images, config.batch, config.seed) == (Path("out"), 100, 4, 0)
    assert isinstance(config.recipe, VaeRecipe)


def test_changes_replace_and_none_leaves(write):
    config = read_config(write(GOOD), images=7, seed=None)
    assert (config.images, config.seed) == (7, 0)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("images = 100", "images = 100\nimage = 1", "'image'.*got 1"),
        ("size = 16", "size = 16\nstyle = ['3d']", r"'data\.style'"),
        ("batch = 4", "batch = 0", "'batch'.*greater than 0.*got 0"),
        ("size = 16", "size = 20", r"'data\.size'.*multiple of 8.*got 20"),
        ("size = 16", "size = 16\n[optim]\nrate = -1", r"'optim\.rate'"),
        ("size = 16", "size = 16\n[optim]\nfall = 'cosin'", r"'optim\.fall'.*'cosine'.*got 'cosin'"),
        ("size = 16", "size = 16\n[optim]\nbetas = [0.9, 1.0]", r"'optim\.betas\.1'.*less than 1"),
        ("batch = 4", "batch = 4\nprecision = 'fp8'", "'precision'"),
        ('kind = "vae"', 'kind = "vae"\nchannels = 48', r"'recipe\.vae\.channels'.*multiple of 32"),
        ('kind = "vae"', 'kind = "gan"', "'recipe'.*'text-to-image'"),
        ('kind = "vae"', 'kind = "text-to-image"', r"'recipe\.text-to-image\.vae'.*required"),
        ("batch = 4\n", "", "'batch'.*required"),
    ],
)
def test_a_bad_setting_is_named(write, old: str, new: str, named: str):
    assert old in GOOD
    path = write(GOOD.replace(old, new))
    with pytest.raises(BadInput, match=named) as caught:
        read_config(path)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: setting ")
        and "\n" not in message
        and len(message) < 300 + len(str(path))
    )


def test_a_bad_change_is_named(write):
    with pytest.raises(BadInput, match=r"setting 'images'.*got -5"):
        read_config(write(GOOD), images=-5)


@pytest.mark.parametrize("data", [b"images = = 3", b"images", b"\xff\xfe"])
def test_what_is_no_toml(tmp_path: Path, data: bytes):
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    with pytest.raises(BadInput, match="is not valid TOML") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(MissingFile, match=r"no training configuration at .*absent\.toml"):
        read_config(tmp_path / "absent.toml")


def test_it_is_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        read_config(write(GOOD)).images = 5  # type: ignore[misc]


def test_the_recipes_of_the_project_can_be_read():
    kinds = [read_config(path).recipe.kind for path in sorted(RECIPES.rglob("*.toml"))]
    assert {"vae", "text-to-image"} <= set(kinds)


def changed(config: TrainConfig, **changes: object) -> str:
    return fingerprint(TrainConfig.model_validate(config.model_dump() | changes))


def test_the_fingerprint_knows_what_makes_a_run(write):
    config = read_config(write(GOOD))
    data, mark = config.data.model_dump(), fingerprint(config)
    same = [
        {"images": 5},
        {"out": "there"},
        {"every": {"save": 1}},
        {"data": data | {"root": "elsewhere"}},
    ]
    other = [
        {"seed": 1},
        {"batch": 5},
        {"precision": "fp32"},
        {"optim": {"rate": 0.5}},
        {"ema": {"half_life": 1}},
        {"data": data | {"size": 24}},
        {"recipe": {"kind": "vae", "kl": 0.5}},
    ]
    assert [changed(config, **each) == mark for each in same] == [True] * 4
    assert len({mark, *(changed(config, **each) for each in other)}) == 8


def test_the_fingerprint_has_not_moved(write):
    """Saves carry it: another value here means that runs in progress could not be resumed."""
    assert fingerprint(read_config(write(GOOD))) == "7abb5cc3cc358f9f"

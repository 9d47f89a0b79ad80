"""What A1111's clients send, field by field.

Every field of A1111's own schema (stable-diffusion-webui 1.10, ``modules/api/models.py``) is known here. One that can
be followed has its type; any other takes its harmless values alone, those that mean "off" there, and everything else
is refused by name: nothing that was asked for is left out in silence. ``null`` is the same as a field that is left
out. So are, since every client sends them whether or not they matter: what concerns a mask where there is none, the
second pass (``hr_*``) where ``enable_hr`` is false, and the refiner where none is named.

What is left out is the model's own choice: its size, steps, solver, guidance. (A1111's defaults, 512 pixels and 50
steps of Euler, suit Stable Diffusion 1 alone.)
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import any_schema, with_info_after_validator_function

from sumuk.base.errors import BadInput, nearest
from sumuk.generate.request import SEEDS

MOST_PICTURES = 64
"""That one call draws, and that one call enlarges."""


class Sent(BaseModel):
    """A body of A1111's, read strictly: nothing unknown is in it, and nothing is taken for what it is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def read(cls, body: Mapping[str, Any], what: str = "") -> Self:
        """The body, or the first three things that are wrong with it.

        Args:
            body: JSON as it came.
            what: where it stands, if it is not the whole body.

        Raises:
            BadInput: names the fields.
        """
        said = {key: value for key, value in body.items() if value is not None or key not in cls.model_fields}
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            raise BadInput(
                "; ".join(what + cls._sentence(each) for each in error.errors()[:3])  # type: ignore[arg-type]
            ) from None

    @classmethod
    def _sentence(cls, error: dict[str, Any]) -> str:
        name = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            return f"unknown field {name[:60]!r}{nearest(name[:60], cls.model_fields)}"
        if error["type"] == "value_error":  # ours
            return str(error["msg"]).removeprefix("Value error, ")
        return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]} (got {reprlib.repr(error['input'])})"


def body_of(kind: type[Sent]) -> dict[str, Any]:
    """What the OpenAPI document says of a body of that kind: null stands for what is left out."""
    schema = kind.model_json_schema()
    needed = schema.get("required", ())
    for name, about in schema["properties"].items():
        if name not in needed and "enum" not in about:
            schema["properties"][name] = {"anyOf": [about, {"type": "null"}]}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def shown(value: Any) -> str:
    """A value in a sentence, shortened before it is written: it may be megabytes."""
    if isinstance(value, list | dict):
        return reprlib.repr(value)
    return json.dumps(value[:40] if isinstance(value, str) else value, ensure_ascii=False)


class Only:
    """The type of a field that cannot be followed: the values that mean that nothing is asked."""

    def __init__(self, *harmless: Any) -> None:
        self._harmless = harmless

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return with_info_after_validator_function(self._check, any_schema())

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._harmless]}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        for each in self._harmless:
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return value
        raise ValueError(f"{info.field_name} {shown(value)} is not supported; leave it out")


Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=8, le=8192)]
Off: TypeAlias = Annotated[Any, Only(False)]
Nothing: TypeAlias = Annotated[Any, Only("")]
Zero: TypeAlias = Annotated[Any, Only(0)]
One: TypeAlias = Annotated[Any, Only(1)]
NoList: TypeAlias = Annotated[Any, Only([])]
NoTable: TypeAlias = Annotated[Any, Only({})]
NoSize: TypeAlias = Annotated[Any, Only(-1, 0)]


class ToImage(Sent):
    """What ``txt2img`` and ``img2img`` have in common."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(default=-1, ge=-1, lt=SEEDS)
    subseed: int = Field(default=-1, ge=-1, lt=SEEDS)
    subseed_strength: Share = 0.0
    sampler_name: str | None = None
    sampler_index: str | None = None
    """The older name of ``sampler_name``, which counts where both are sent, as there."""
    scheduler: str | None = None
    batch_size: int = Field(default=1, ge=1, le=MOST_PICTURES)
    n_iter: int = Field(default=1, ge=1, le=MOST_PICTURES)
    steps: int | None = Field(default=None, ge=1, le=1000)
    cfg_scale: Number | None = Field(default=None, ge=0.0, le=100.0)
    width: Side | None = None
    height: Side | None = None
    eta: Number | None = Field(default=None, ge=0.0, le=1.0)
    """webuiapi always sends 1. It goes to those samplers that take it there; 0 and 1 do nothing for others."""
    denoising_strength: Share = 0.75
    refiner_checkpoint: str = ""
    refiner_switch_at: Number | None = Field(default=None, ge=0.0, le=1.0)
    override_settings: dict[str, Any] = Field(default_factory=dict)
    override_settings_restore_afterwards: bool = True
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)
    send_images: bool = True
    save_images: bool = False
    """Either way: what is drawn stays in the job's results as long as the server keeps any."""
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    """Either way: no grid is made."""

    styles: NoList = None
    seed_resize_from_h: NoSize = None
    seed_resize_from_w: NoSize = None
    restore_faces: Off = None
    tiling: Off = None
    s_min_uncond: Zero = None
    s_churn: Zero = None
    s_tmax: Zero = None
    s_tmin: Zero = None
    s_noise: One = None
    disable_extra_networks: Off = None
    firstpass_image: Nothing = None
    comments: NoTable = None
    script_name: Annotated[Any, Only("", "None")] = None
    script_args: NoList = None
    force_task_id: Nothing = None
    infotext: Nothing = None

    @property
    def sampler(self) -> str | None:
        """The sampler's name, if one is asked for."""
        return self.sampler_name or self.sampler_index or None

    @property
    def count(self) -> int:
        return self.batch_size * self.n_iter

    @property
    def refiner(self) -> str | None:
        """The refiner's name, if one is asked for."""
        return None if self.refiner_checkpoint in ("", "None") else self.refiner_checkpoint


class Txt2Img(ToImage):
    """``POST /sdapi/v1/txt2img``."""

    enable_hr: bool = False
    hr_scale: Number = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = Field(default=0, ge=0, le=1000)
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    firstphase_width: Zero = None
    firstphase_height: Zero = None


class Img2Img(ToImage):
    """``POST /sdapi/v1/img2img``."""

    init_images: list[str] = Field(default_factory=list)
    resize_mode: Literal[0, 1, 2] = 0
    """0: just resize, 1: crop and resize, 2: resize and fill."""
    mask: str | None = None
    mask_blur: int | None = Field(default=None, ge=0, le=256)
    mask_blur_x: int = Field(default=4, ge=0, le=256)
    mask_blur_y: int = Field(default=4, ge=0, le=256)
    mask_round: Annotated[Any, Only(True)] = None
    inpainting_fill: Literal[0, 1, 2, 3] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(default=0, ge=0, le=8192)
    inpainting_mask_invert: Literal[0, 1] = 0
    include_init_images: bool = False
    image_cfg_scale: Annotated[Any, Only(1.5)] = None
    """webuiapi always sends 1.5, the default of A1111's page."""
    initial_noise_multiplier: One = None
    latent_mask: Nothing = None


class Options(Sent):
    """``/sdapi/v1/options``: kept for each key, for its later calls of this API; and ``override_settings``.

    What is said of pictures on disk is how it is here, and can be said back.
    """

    sd_model_checkpoint: str | None = None
    sd_vae: str = "Automatic"
    CLIP_stop_at_last_layers: int = Field(default=1, ge=1, le=12)
    samples_format: Literal["png", "jpg", "jpeg", "webp"] = "png"
    jpeg_quality: int = Field(default=80, ge=1, le=100)
    samples_save: Annotated[Any, Only(True)] = True
    enable_pnginfo: Annotated[Any, Only(True)] = True
    return_grid: Off = False
    grid_save: Off = False
    face_restoration: Off = False
    tiling: Off = False
    eta_noise_seed_delta: Zero = 0
    randn_source: Annotated[Any, Only("CPU")] = "CPU"

    @property
    def said(self) -> dict[str, Any]:
        """Those that were said."""
        return self.model_dump(exclude_unset=True)


class Unit(Sent):
    """A unit of the ControlNet extension, as its version 1.1.4 takes it in ``alwayson_scripts``.

    The picture that it follows must be finished (edges, depth, pose): there is no preprocessor here, and what concerns
    one (``processor_res``, ``threshold_a``, ``threshold_b``, ``pixel_perfect``) does nothing there either without it.
    """

    enabled: bool = True
    image: str | None = None
    input_image: str | None = None
    """Its older name."""
    model: str = "None"
    weight: Number = 1.0
    guidance_start: Share = 0.0
    guidance_end: Share | None = None
    guidance: Share | None = None
    """The older name of ``guidance_end``."""
    control_mode: Literal[
        0, 1, 2, "Balanced", "My prompt is more important", "ControlNet is more important"
    ] = 0
    guessmode: bool = False
    resize_mode: int | str | None = None
    module: str = "none"
    processor_res: Number = -1
    threshold_a: Number = -1
    threshold_b: Number = -1
    pixel_perfect: bool = False
    low_vram: bool = False
    lowvram: bool = False
    save_detected_map: bool = True
    """Either way: nothing is detected here."""
    inpaint_crop_input_image: bool = True
    hr_option: str = "Both"
    mask: Nothing = None
    mask_image: Nothing = None
    effective_region_mask: Nothing = None
    advanced_weighting: NoList = None
    ipadapter_input: NoList = None
    pulid_mode: Annotated[Any, Only("Fidelity")] = None
    union_control_type: Annotated[Any, Only("Unknown")] = None
    is_ui: Off = None
    input_mode: Annotated[Any, Only("simple")] = None
    batch_images: Nothing = None
    output_dir: Nothing = None
    loopback: Off = None


class Enlarging(Sent):
    """What ``extra-single-image`` and ``extra-batch-images`` have in common."""

    resize_mode: Literal[0, 1] = 0
    """0: by ``upscaling_resize``, 1: to ``upscaling_resize_w`` x ``upscaling_resize_h``."""
    upscaling_resize: Number = Field(default=2.0, gt=0.0, le=16.0)
    upscaling_resize_w: int = Field(default=512, ge=1, le=16384)
    upscaling_resize_h: int = Field(default=512, ge=1, le=16384)
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: Share = 0.0
    show_extras_results: Annotated[Any, Only(True)] = None
    gfpgan_visibility: Zero = None
    codeformer_visibility: Zero = None
    codeformer_weight: Share = 0.0
    """Does nothing without visibility, there as here."""
    upscale_first: bool = False
    """Likewise: there is no face to be restored before or after."""


class OnePicture(Enlarging):
    """``POST /sdapi/v1/extra-single-image``."""

    image: str


class SomePictures(Enlarging):
    """``POST /sdapi/v1/extra-batch-images``."""

    imageList: list[dict[Literal["data", "name"], str]] = Field(min_length=1, max_length=MOST_PICTURES)


class OfPicture(Sent):
    """``POST /sdapi/v1/png-info``."""

    image: str

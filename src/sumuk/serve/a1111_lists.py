"""What A1111's clients look up: models, samplers, options, memory. What there is none of is an empty list."""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter, Request

from sumuk.serve.a1111_names import (
    LATENT_UPSCALERS,
    SAMPLERS,
    SCHEDULERS,
    UPSCALERS,
    entry_of,
    label_of,
    title_of,
    usual_model,
)
from sumuk.serve.a1111_order import keep_options, kept_options, named
from sumuk.serve.a1111_schema import Options, body_of
from sumuk.serve.calls import TheDesk
from sumuk.serve.desk import Desk
from sumuk.serve.metrics import resident
from sumuk.serve.trouble import refused
from sumuk.serve.wire import Entry

router = APIRouter(tags=["a1111"])


async def _entries(desk: Desk, sort: str) -> list[Entry]:
    return [each for each in await desk.catalogue() if each.sort == sort]


@router.get("/sdapi/v1/options")
async def options(request: Request, desk: TheDesk) -> dict[str, Any]:
    """The caller's options. All of it can be sent back."""
    entries = await desk.catalogue()
    kept = Options.read(await kept_options(request))
    model, _ = named(kept, entries)
    entry = usual_model(entries, desk.config) if model is None else entry_of(model, "model", entries, "")
    return kept.model_dump() | {"sd_model_checkpoint": None if entry is None else title_of(entry)}


@router.post("/sdapi/v1/options", openapi_extra=body_of(Options))
async def set_options(request: Request, body: dict[str, Any]) -> None:
    """Change some of the caller's options, for its later calls of this API."""
    await keep_options(request, body)


@router.get("/sdapi/v1/cmd-flags")
async def cmd_flags(desk: TheDesk) -> dict[str, Any]:
    """How the server was started, as far as it is the same here."""
    config = desk.config
    return {"api": True, "listen": not config.loopback, "port": config.port, "nowebui": not config.page}


@router.get("/sdapi/v1/samplers")
async def samplers(desk: TheDesk) -> list[dict[str, Any]]:
    """Solvers: those that A1111 knows by its names, the others by ours."""
    grids = {grid: name for name, (_, grid) in SCHEDULERS.items() if grid is not None}
    aliases = {each.solver: [each.alias] for each in SAMPLERS}
    return [
        {
            "name": label_of(each["name"]),
            "aliases": list(dict.fromkeys([*aliases.get(each["name"], []), each["name"]])),
            "options": {"scheduler": grids.get(each["grid"], each["grid"])},
        }
        for each in (await desk.choices())["solvers"]
    ]


@router.get("/sdapi/v1/schedulers")
async def schedulers(desk: TheDesk) -> list[dict[str, Any]]:
    """Step spacings: those that A1111 knows by its names, the others by ours."""
    known = [(name, label) for name, (label, _) in SCHEDULERS.items()]
    ours = {grid for _, grid in SCHEDULERS.values()}
    own = [
        each["name"] for each in (await desk.choices())["grids"] if each["name"] not in {*ours, *SCHEDULERS}
    ]
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in [*known, *((each, each) for each in own)]
    ]


@router.get("/sdapi/v1/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """Those of ``extra-single-image``."""
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
        for name in UPSCALERS
    ]


@router.get("/sdapi/v1/latent-upscale-modes")
async def latent_upscale_modes() -> list[dict[str, str]]:
    """Names that ``hr_upscaler`` may have; all mean the same here."""
    return [{"name": name} for name in LATENT_UPSCALERS]


@router.get("/sdapi/v1/sd-models")
async def sd_models(desk: TheDesk) -> list[dict[str, Any]]:
    """Checkpoints that draw."""
    return [
        {
            "title": title_of(each),
            "model_name": each.name,
            "hash": None if each.sha256 is None else each.sha256[:10],
            "sha256": each.sha256,
            "filename": each.file,
            "config": None,
        }
        for each in await _entries(desk, "model")
    ]


@router.get("/sdapi/v1/sd-vae")
async def sd_vae(desk: TheDesk) -> list[dict[str, str]]:
    """Autoencoders."""
    return [{"model_name": each.name, "filename": each.file} for each in await _entries(desk, "vae")]


@router.get("/sdapi/v1/loras")
async def loras(desk: TheDesk) -> list[dict[str, Any]]:
    """LoRAs, to be named in a prompt: ``<lora:name:0.8>``."""
    return [
        {"name": each.name, "alias": each.name, "path": each.file, "metadata": {}}
        for each in await _entries(desk, "lora")
    ]


@router.get("/sdapi/v1/hypernetworks")
async def hypernetworks(desk: TheDesk) -> list[dict[str, str]]:
    """Hypernetworks, to be named in a prompt: ``<hypernet:name:0.8>``."""
    return [{"name": each.name, "path": each.file} for each in await _entries(desk, "hypernet")]


@router.get("/sdapi/v1/embeddings")
async def embeddings(desk: TheDesk) -> dict[str, dict[str, Any]]:
    """Embeddings, to be named in a prompt. Which model takes which is found out when it draws."""
    untold = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
    return {"loaded": {each.name: untold for each in await _entries(desk, "embedding")}, "skipped": {}}


@router.get("/sdapi/v1/scripts")
async def scripts(desk: TheDesk) -> dict[str, list[str]]:
    """``controlnet``, where ControlNets are offered."""
    some = ["controlnet"] if await _entries(desk, "control") else []
    return {"txt2img": some, "img2img": some}


@router.get("/sdapi/v1/script-info")
async def script_info() -> list[dict[str, Any]]:
    """Nothing: what the ControlNet extension takes is said by itself."""
    return []


@router.get("/controlnet/model_list")
async def controlnet_models(desk: TheDesk) -> dict[str, list[str]]:
    """ControlNets and adapters, as the extension lists them."""
    return {"model_list": [each.name for each in await _entries(desk, "control")]}


@router.get("/controlnet/module_list")
async def controlnet_modules() -> dict[str, Any]:
    """No preprocessor is here."""
    return {"module_list": ["none"], "module_detail": {}}


@router.get("/controlnet/version")
async def controlnet_version() -> dict[str, int]:
    """Of the extension's API."""
    return {"version": 2}


@router.get("/sdapi/v1/memory")
async def memory(desk: TheDesk) -> dict[str, Any]:
    """Bytes: of the machine, and of the server's own processes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    used = resident() + desk.vitals.resident
    device = desk.vitals.device_memory
    return {
        "ram": {"free": total - used, "used": used, "total": total},
        "cuda": {"allocated": {"current": device}} if device else {"error": "unavailable"},
    }


@router.get("/sdapi/v1/face-restorers")
@router.get("/sdapi/v1/realesrgan-models")
@router.get("/sdapi/v1/prompt-styles")
@router.get("/sdapi/v1/extensions")
async def none_of_them() -> list[dict[str, Any]]:
    """There is none here."""
    return []


@router.post("/sdapi/v1/refresh-checkpoints")
@router.post("/sdapi/v1/refresh-loras")
@router.post("/sdapi/v1/refresh-vae")
@router.post("/sdapi/v1/refresh-embeddings")
async def refresh(desk: TheDesk) -> dict[str, Any]:
    """List the shelf again. It is looked at every few seconds anyway, so that nothing else is to be done."""
    await desk.catalogue()
    return {}


@router.post("/sdapi/v1/reload-checkpoint")
async def reload_checkpoint(request: Request, desk: TheDesk) -> dict[str, Any]:
    """Bring the checkpoint of the caller's options into memory."""
    name, _ = named(Options.read(await kept_options(request)), await desk.catalogue())
    if name is None and (usual := usual_model(await desk.catalogue(), desk.config)) is not None:
        name = usual.name
    if name is not None:
        await desk.load(name)
    return {}


@router.post("/sdapi/v1/unload-checkpoint")
async def unload_checkpoint() -> dict[str, Any]:
    """Not here: models leave memory when others need it."""
    raise refused(
        "not-here",
        "a checkpoint is not unloaded by hand here; the least recently used one goes when memory is needed",
    )

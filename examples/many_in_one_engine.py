"""Requests with different solvers, steps and prompts share one engine; one joins late, one is cancelled."""

from pathlib import Path

import sumuk
from sumuk.generate.engine import Engine, Failed, Finished, Progress
from sumuk.generate.receipt import save_png

engine = Engine(sumuk.miniature())
names = {
    engine.submit(sumuk.Request(prompt="a red heart, flat style", seed=7, steps=8)): "heart",
    engine.submit(sumuk.Request(prompt="고양이, 3d", seed=3, steps=12, solver="euler-a")): "cat",
    engine.submit(sumuk.Request(prompt="pizza, 3d", seed=1, steps=50)): "pizza",
}
heart, cat, pizza = names

for event in engine.events():
    if isinstance(event, Progress) and event.job == heart and event.step == 4:
        names[engine.submit(sumuk.Request(prompt="피자, 플랫", seed=1, steps=6, guidance=3.0))] = "late"
        engine.cancel(pizza)
    elif isinstance(event, Finished):
        save_png(event.picture, event.receipt, Path(f"{names[event.job]}.png"))
        print(names[event.job], "is drawn")
    elif isinstance(event, Failed):
        print(names[event.job], "stopped:", event.error)

"""Draw one picture with the miniature, and write it with its receipt."""

from pathlib import Path

import sumuk
from sumuk.generate.engine import Finished, Progress
from sumuk.generate.receipt import save_png

request = sumuk.Request(prompt="a fox, 3d style", steps=12, seed=7)
for event in sumuk.generate(sumuk.miniature(), request):
    if isinstance(event, Progress):
        print(f"step {event.step} of {event.steps}")
    elif isinstance(event, Finished):
        save_png(event.picture, event.receipt, Path("fox.png"))
        print("fox.png, seed", event.receipt["settings"]["seed"])

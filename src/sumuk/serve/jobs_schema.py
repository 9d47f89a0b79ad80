"""What our own API takes and answers: jobs, their pictures, what is offered, problems."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sumuk.generate.request import Text
from sumuk.serve.order import Job, Result, State
from sumuk.serve.trouble import MEDIA, Trouble
from sumuk.serve.wire import Entry
from sumuk.serve.wish import Base64, Strict, Wish


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="urn:sumuk: and a short stable name.")
    title: str
    status: int
    detail: str = Field(description="What is wrong with what, and what to do.")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": told, "content": {MEDIA: {"schema": Problem.model_json_schema()}}}
    for status, told in (
        ("4XX", "It is not done, and the caller can mend it."),
        ("5XX", "It is not done, and the server's state is why."),
    )
}
"""For every address: how it says no."""


class Submission(Strict):
    """What to draw, with what, and until when."""

    request: Wish  # type: ignore[valid-type]  # made from the request's fields
    model: Text | None = Field(None, description="Name of a model that is offered; null: the usual one.")
    vae: Text | None = Field(None, description="Name of an autoencoder in place of the model's own.")
    refiner: Text | None = Field(None, description="Name of a model that draws the last part.")
    controls: dict[Text, Text] = Field(
        default_factory=dict, description="ControlNets: names in the request -> names that are offered."
    )
    deadline: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds in which it must be finished."
    )


class Dropped(Strict):
    """A PNG that somebody brings."""

    picture: Base64


class Found(BaseModel):
    """What made it."""

    request: dict[str, Any] = Field(description="Fields of a request, to submit again.")
    model: dict[str, str] = Field(description="Which one drew it, as far as it says so.")
    source: str = Field(description="Whose text was read: sumuk or a1111.")
    left_out: dict[str, str] = Field(description="What was not taken over, and why.")


class PictureDocument(BaseModel):
    """A finished picture."""

    index: int
    url: str
    receipt: str = Field(description="Address of what made it.")
    seed: int
    width: int
    height: int
    sha256: str

    @classmethod
    def of(cls, job: str, result: Result) -> PictureDocument:
        url = f"/api/jobs/{job}/images/{result.image}"
        return cls(
            index=result.image,
            url=url,
            receipt=f"{url}/receipt",
            seed=result.seed,
            width=result.width,
            height=result.height,
            sha256=result.sha256,
        )


class JobDocument(BaseModel):
    """A job. Times are seconds since 1970."""

    id: str
    state: State
    url: str
    request: dict[str, Any] = Field(description="As sent, with the seed; a picture by its SHA-256.")
    model: str | None
    vae: str | None
    refiner: str | None
    controls: dict[str, str]
    deadline: float | None
    count: int
    cost: float = Field(description="Pixels x steps x rows, all pictures together.")
    created: float
    began: float | None
    ended: float | None
    attempt: int
    position: int | None = Field(description="How many jobs are served before it, while it waits.")
    step: int
    steps: int
    pictures: list[PictureDocument]
    trouble: Problem | None = Field(description="Why it failed or was cancelled.")

    @classmethod
    def of(cls, job: Job) -> JobDocument:
        order = job.order
        return cls(
            id=job.id,
            state=job.state,
            url=f"/api/jobs/{job.id}",
            request=dict(order.values),
            model=order.model,
            vae=order.vae,
            refiner=order.refiner,
            controls=dict(order.controls),
            deadline=order.deadline,
            count=job.count,
            cost=job.cost,
            created=job.created,
            began=job.began,
            ended=job.ended,
            attempt=job.attempt,
            position=job.position,
            step=job.step,
            steps=job.steps,
            pictures=sorted(
                (PictureDocument.of(job.id, each) for each in job.results), key=lambda each: each.index
            ),
            trouble=None if job.trouble is None else problem_of(job.trouble),
        )


def problem_of(trouble: Trouble) -> Problem:
    return Problem(**trouble.as_problem())


class JobList(BaseModel):
    """Jobs, the newest first."""

    jobs: list[JobDocument]
    next: str | None = Field(description="Give it as 'before' for the next page; null: that was the last.")


class Offer(BaseModel):
    """What the server offers by name."""

    models: list[Entry]


class Loaded(BaseModel):
    """A model that is in memory now."""

    name: str


class Choices(BaseModel):
    """Solvers and step spacings, and every other name under which each is known."""

    solvers: list[dict[str, Any]]
    grids: list[dict[str, Any]]

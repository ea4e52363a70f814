"""What clients send and get: the fields of the OpenAI Images API and ours beside them; unknown fields are refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "EngineDocument",
    "GenerationBody",
    "ImageDocument",
    "ImagesDocument",
    "ModelDocument",
    "ModelsDocument",
    "RunningDocument",
]

MAX_SEED = 2**63 - 1


class GenerationBody(BaseModel):
    """``POST /v1/images/generations``. Fields that change nothing here are taken and ignored, as clients send them."""

    # Strict: "3" is no number, and a boolean is none either.
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        default="",
        max_length=32_000,
        description="For a class-conditional model the name or number of a label; empty picks label seed mod classes.",
    )
    model: str | None = Field(default=None, max_length=200, description="The served model, or nothing.")
    n: int | None = Field(default=None, ge=1, le=1000, description="Images; image i has seed + i. Default 1.")
    size: str | None = Field(default=None, max_length=20, description="auto, or the one size of the model.")
    response_format: Literal["b64_json", "url"] | None = Field(default=None, description="b64_json; url is refused.")
    output_format: Literal["png", "webp", "jpeg"] | None = Field(default=None, description="Default png.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of webp and jpeg; default 100."
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=16)] | None = Field(
        default=None, description="Previews of each image in a stream; OpenAI's own limit is 3. Default 0."
    )
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        default=None, description="transparent is refused."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        default=None, description="Ignored."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description="Ignored.")
    moderation: Literal["low", "auto"] | None = Field(default=None, description="Ignored: nothing is moderated.")
    user: str | None = Field(default=None, max_length=512, description="Ignored, and not logged.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="Ignored, and not logged.")

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Of the first image; drawn at random where it is missing."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: Literal["ddim", "ddpm", "dpmpp-2m", "euler"] | None = Field(default=None, description="Default ddim.")
    eta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Noise of the ddim sampler. Default 0."
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None, description="Classifier-free guidance; 1, the default, is none."
    )
    negative_prompt: str | None = Field(
        default=None, max_length=32_000, description="Refused unless empty: no model here takes text."
    )
    class_label: Annotated[str, Field(max_length=200)] | Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Name or number of a label, for a class-conditional model."
    )


class ImageDocument(BaseModel):
    """One image: OpenAI's fields, and what is needed to make it again."""

    b64_json: str
    revised_prompt: None = None
    seed: int
    class_label: str | None = None


class ImagesDocument(BaseModel):
    """The answer without ``stream``."""

    created: int
    data: list[ImageDocument]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "webp", "jpeg"]
    quality: Literal["auto"] = "auto"
    size: str


class ModelDocument(BaseModel):
    """A model of ``/v1/models``: OpenAI's fields, and what a request may ask of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["qdm-deploy"] = "qdm-deploy"
    bundle_id: str
    size: str
    num_classes: int | None
    labels: list[str] | None
    guidance: bool
    samplers: list[str]
    default_steps: int
    max_steps: int
    max_images: int
    max_previews: int


class ModelsDocument(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelDocument]


class RunningDocument(BaseModel):
    """A request in the running batch; ``step`` of ``steps`` of its furthest image."""

    id: str
    step: int
    steps: int
    rows: int


class StepDocument(BaseModel):
    """One run of the session."""

    rows: int
    padding_rows: int
    seconds: float


class EngineDocument(BaseModel):
    """``GET /v1/engine``: the running batch, and the last runs of the session, oldest first."""

    phase: Literal["loading", "ready", "restarting", "draining", "dead"]
    running_rows: int
    max_rows: int
    waiting: int
    max_waiting: int
    restarts: int
    backend: dict[str, object]
    running: list[RunningDocument]
    total_steps: int
    recent_steps: list[StepDocument]

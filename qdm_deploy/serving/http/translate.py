"""From the body of a request to what the engine is asked; every refusal names the field and what is allowed."""

import secrets
from dataclasses import dataclass

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.http.bodies import MAX_SEED, GenerationBody
from qdm_deploy.serving.http.errors import ApiError
from qdm_deploy.serving.http.settings import HttpSettings

__all__ = ["Order", "label_name", "order_of", "size_of"]

# Random seeds stay exact in JavaScript, whose numbers end at 2**53.
_RANDOM_SEEDS = 2**32
_MANY_LABELS = 50


@dataclass(frozen=True)
class Order:
    """What to generate, and how to hand it over.

    Attributes:
        request: for the engine.
        output_format: png, webp or jpeg.
        quality: of webp and jpeg, 0 .. 100.
        stream: as server-sent events.
    """

    request: GenerationRequest
    output_format: str
    quality: int
    stream: bool


def size_of(model: ModelSpec) -> str:
    """WIDTHxHEIGHT of the model's pictures."""
    _, height, width = model.sample_shape
    return f"{width}x{height}"


def label_name(model: ModelSpec, label: int) -> str:
    """A label's name, or its number where the model names none."""
    return model.labels[label] if model.labels else str(label)


def order_of(body: GenerationBody, model: ModelSpec, settings: HttpSettings, request_id: str) -> Order:
    """Check a body against the model and the limits.

    Raises:
        ApiError: 404 for another model, 400 for a value that cannot be used.
    """
    if body.model is not None and body.model != model.name:
        raise ApiError(
            404,
            f"the model {body.model!a} is not served here; leave it out, or ask for {model.name!a}",
            code="model_not_found",
            param="model",
        )
    images = body.n if body.n is not None else 1
    if images > settings.max_images:
        raise _unusable("n", f"{images} images are too many for one request; ask for 1 to {settings.max_images}")
    steps = body.num_inference_steps
    most = min(settings.max_steps, model.num_train_timesteps)
    if steps is not None and steps > most:
        raise _unusable("num_inference_steps", f"{steps} steps are too many; ask for 1 to {most}")
    first = body.seed if body.seed is not None else secrets.randbelow(_RANDOM_SEEDS)
    if first + images - 1 > MAX_SEED:
        raise _unusable("seed", f"seed {first} leaves no room for {images} images; the last seed is {MAX_SEED}")
    seeds = tuple(range(first, first + images))
    _check_delivery(body, model)
    _check_text(body, model, settings)
    guidance = float(body.guidance_scale) if body.guidance_scale is not None else 1.0
    if guidance != 1.0 and (not model.conditional or model.null_label is None):
        raise _unusable("guidance_scale", f"{model.name} cannot be guided; leave guidance_scale out, or set it to 1")
    sampler = body.sampler or "ddim"
    eta = float(body.eta) if body.eta is not None else 0.0
    if eta != 0.0 and sampler != "ddim":
        raise _unusable("eta", f"eta {eta} means nothing to the sampler {sampler}; leave it out, or ask for ddim")
    stream = bool(body.stream)
    request = GenerationRequest(
        request_id=request_id,
        seeds=seeds,
        sampler=sampler,
        steps=steps if steps is not None else min(settings.default_steps, most),
        eta=eta,
        guidance=guidance,
        class_labels=_labels(body, model, seeds),
        deadline=settings.request_timeout,
        previews=(body.partial_images or 0) if stream else 0,
    )
    quality = body.output_compression if body.output_compression is not None else 100
    return Order(request, body.output_format or "png", quality, stream)


def _unusable(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _check_delivery(body: GenerationBody, model: ModelSpec) -> None:
    size = size_of(model)
    if body.size not in (None, "auto", size):
        raise _unusable("size", f"the size {body.size!a} is not made here; {model.name} makes {size} (or say auto)")
    if body.response_format == "url":
        raise _unusable("response_format", "images are not stored, so there is no url; ask for b64_json")
    if body.background == "transparent":
        raise _unusable("background", f"{model.name} makes no transparency; ask for opaque or auto")
    if (body.output_format or "png") == "png" and body.output_compression not in (None, 100):
        raise _unusable("output_compression", "png is lossless; leave output_compression out, or ask for webp or jpeg")
    if body.partial_images and not body.stream:
        raise _unusable("partial_images", "partial images come in a stream only; set stream to true")


def _check_text(body: GenerationBody, model: ModelSpec, settings: HttpSettings) -> None:
    if body.negative_prompt:
        raise _unusable("negative_prompt", f"{model.name} takes no text; leave negative_prompt out")
    if len(body.prompt) > settings.max_prompt:
        raise _unusable("prompt", f"the prompt has {len(body.prompt)} characters; allowed are {settings.max_prompt}")
    if model.num_classes is None and body.prompt.strip():
        raise _unusable("prompt", f"{model.name} is unconditional and takes no prompt; send an empty one")
    if model.num_classes is None and body.class_label is not None:
        raise _unusable("class_label", f"{model.name} has no classes; leave class_label out")


def _labels(body: GenerationBody, model: ModelSpec, seeds: tuple[int, ...]) -> tuple[int, ...] | None:
    """One label per image. Without a wish it follows from the seed, so a seed alone says what image it makes."""
    if model.num_classes is None:
        return None
    prompt = body.prompt.strip()
    wished = None if body.class_label is None else _number(body.class_label, model, "class_label")
    if prompt:
        named = _number(prompt, model, "prompt")
        if wished is not None and wished != named:
            raise _unusable(
                "class_label",
                f"class_label says {label_name(model, wished)!a} and the prompt {label_name(model, named)!a}; "
                "give one of them",
            )
        wished = named
    if wished is not None:
        return (wished,) * len(seeds)
    return tuple(seed % model.num_classes for seed in seeds)


def _number(given: str | int, model: ModelSpec, param: str) -> int:
    count = model.num_classes or 0
    text = str(given)
    # Of a text names come first: a label may be called "7". A JSON number is a number.
    for number, name in enumerate(model.labels or ()):
        if isinstance(given, str) and name.casefold() == text.strip().casefold():
            return number
    digits = text.strip()
    if digits.isascii() and digits.isdecimal() and len(digits) < 10 and int(digits) < count:
        return int(digits)
    names = ", ".join((model.labels or ())[:_MANY_LABELS])
    if len(model.labels or ()) > _MANY_LABELS:
        names += ", ..."
    shown = text if len(text) <= 60 else text[:60] + "..."
    allowed = f"one of {names}, or 0 to {count - 1}" if names else f"a number from 0 to {count - 1}"
    raise _unusable(param, f"{shown!a} is no label of {model.name}; ask for {allowed}")

"""From the body of a request to what the engine is asked; every refusal names the field and what is allowed."""

import secrets
from dataclasses import dataclass, field
from typing import Self

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.pipeline_spec import LabelTable, PipelineSpec
from qdm_deploy.components.decoder import NoDecoder, SampleDecoder, open_decoder
from qdm_deploy.components.encoders import Encoder, open_encoder
from qdm_deploy.components.sampling import SamplingOptions, run_settings
from qdm_deploy.errors import InputError
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.http.bodies import MAX_SEED, GenerationBody
from qdm_deploy.serving.http.errors import ApiError
from qdm_deploy.serving.http.settings import HttpSettings

__all__ = ["Makers", "Order", "order_of", "size_of"]

# Random seeds stay exact in JavaScript, whose numbers end at 2**53.
_RANDOM_SEEDS = 2**32
_MANY_LABELS = 50


@dataclass(frozen=True)
class Makers:
    """What stands between a request and the denoiser, and what is done where a request leaves it open.

    Attributes:
        encoder: makes conditions.
        decoder: makes pictures of samples.
        sampler, guidance: the model's own (``qdm_deploy.components.sampling.run_settings``).
    """

    encoder: Encoder
    decoder: SampleDecoder = field(default_factory=NoDecoder)
    sampler: str = "ddim"
    guidance: float = 1.0

    @classmethod
    def of_bundle(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Those of a bundle; ``threads`` are the decoder's.

        Raises:
            InputError: it needs states that nothing makes, or makes latents and has no decoder.
        """
        run = run_settings(SamplingOptions(), bundle.pipeline, bundle.scheduler_config())
        encoder = open_encoder(bundle.pipeline, root=bundle.path)
        return cls(encoder, open_decoder(bundle, threads=threads), run.sampler, run.guidance)


@dataclass(frozen=True)
class Order:
    """What to generate, and how to hand it over.

    Attributes:
        request: for the engine.
        captions: what each image shows; None where there is nothing to say.
        negatives: what it does not show.
        output_format: png, webp or jpeg.
        quality: of webp and jpeg, 0 .. 100.
        stream: as server-sent events.
    """

    request: GenerationRequest
    captions: tuple[str | None, ...]
    negatives: tuple[str | None, ...]
    output_format: str
    quality: int
    stream: bool


def size_of(model: PipelineSpec) -> str:
    """WIDTHxHEIGHT of the model's pictures."""
    _, height, width = model.picture_shape or model.sample_shape
    return f"{width}x{height}"


def order_of(
    body: GenerationBody, model: PipelineSpec, settings: HttpSettings, request_id: str, makers: Makers
) -> Order:
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
    most = min(settings.max_steps, model.denoiser.num_train_timesteps)
    if steps is not None and steps > most:
        raise _unusable("num_inference_steps", f"{steps} steps are too many; ask for 1 to {most}")
    first = body.seed if body.seed is not None else secrets.randbelow(_RANDOM_SEEDS)
    if first + images - 1 > MAX_SEED:
        raise _unusable("seed", f"seed {first} leaves no room for {images} images; the last seed is {MAX_SEED}")
    seeds = tuple(range(first, first + images))
    _check_delivery(body, model)
    prompt = _prompt(body, model, settings)
    encoder = makers.encoder
    guidance = float(body.guidance_scale) if body.guidance_scale is not None else makers.guidance
    if guidance != 1.0 and not encoder.can_be_guided:
        raise _unusable("guidance_scale", f"{model.name} cannot be guided; leave guidance_scale out, or set it to 1")
    sampler = body.sampler or makers.sampler
    eta = float(body.eta) if body.eta is not None else 0.0
    if eta != 0.0 and sampler != "ddim":
        raise _unusable("eta", f"eta {eta} means nothing to the sampler {sampler}; leave it out, or ask for ddim")
    stream = bool(body.stream)
    prompts = [prompt] * images
    try:
        # Without a wish it follows from the seed, so that a seed alone says what image it makes.
        negative = [body.negative_prompt] * images if body.negative_prompt else None
        conditioning = encoder.encode(prompts, negative, first=first)
        captions = encoder.captions(prompts, first=first)
        negatives = encoder.negatives(prompts, negative, first=first)
    except InputError as error:
        raise _unusable("prompt", str(error)) from error
    request = GenerationRequest(
        request_id=request_id,
        seeds=seeds,
        sampler=sampler,
        steps=steps if steps is not None else min(settings.default_steps, most),
        eta=eta,
        guidance=guidance,
        conditioning=conditioning,
        deadline=settings.request_timeout,
        previews=(body.partial_images or 0) if stream else 0,
    )
    quality = body.output_compression if body.output_compression is not None else 100
    return Order(request, tuple(captions), tuple(negatives), body.output_format or "png", quality, stream)


def _unusable(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _check_delivery(body: GenerationBody, model: PipelineSpec) -> None:
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


def _prompt(body: GenerationBody, model: PipelineSpec, settings: HttpSettings) -> str | None:
    """What the encoder is asked for: the prompt, or the class label, which is a number or a name of its own."""
    if body.negative_prompt and not model.text_encoders:
        raise _unusable("negative_prompt", f"{model.name} takes no text; leave negative_prompt out")
    if len(body.prompt) > settings.max_prompt:
        raise _unusable("prompt", f"the prompt has {len(body.prompt)} characters; allowed are {settings.max_prompt}")
    prompt, labels = body.prompt.strip() or None, model.encoder
    if model.text_encoders:
        if body.class_label is not None:
            raise _unusable("class_label", f"{model.name} takes prompts and has no classes; leave class_label out")
        return body.prompt
    if not isinstance(labels, LabelTable):
        if prompt is not None:
            raise _unusable("prompt", f"{model.name} is unconditional and takes no prompt; send an empty one")
        if body.class_label is not None:
            raise _unusable("class_label", f"{model.name} has no classes; leave class_label out")
        return None
    named = None if prompt is None else _label(prompt, labels, model.name, "prompt")
    wished = None if body.class_label is None else _label(body.class_label, labels, model.name, "class_label")
    if named is not None and wished is not None and named != wished:
        raise _unusable("class_label", f"class_label says {wished!a} and the prompt {named!a}; give one of them")
    return wished if named is None else named


def _label(given: str | int, labels: LabelTable, model: str, param: str) -> str:
    """A label by its name, or by its number where it has none."""
    names, text = labels.labels or (), str(given).strip()
    # Of a text names come first: a label may be called "7". A JSON number is a number.
    if isinstance(given, str):
        for name in names:
            if name.casefold() == text.casefold():
                return name
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < labels.num_classes:
        return names[int(text)] if names else str(int(text))
    shown = ", ".join(names[:_MANY_LABELS]) + (", ..." if len(names) > _MANY_LABELS else "")
    short = text if len(text) <= 60 else text[:60] + "..."
    last = labels.num_classes - 1
    allowed = f"one of {shown}, or 0 to {last}" if names else f"a number from 0 to {last}"
    raise _unusable(param, f"{short!a} is no label of {model}; ask for {allowed}")

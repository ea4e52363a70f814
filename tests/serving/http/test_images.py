"""``POST /v1/images/generations``: what comes back for what was asked."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image


def picture(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_images_carry_their_seeds_and_how_they_were_made(served: Any) -> None:
    answer = served.generate({"prompt": "", "n": 3, "seed": 7, "num_inference_steps": 5, "guidance_scale": 2})
    assert answer.status_code == 200
    document = answer.json()
    assert [image["seed"] for image in document["data"]] == [7, 8, 9]
    assert [image["class_label"] for image in document["data"]] == ["bag", "boot", "shirt"]  # seed modulo classes
    assert document["size"] == "10x8"
    assert document["output_format"] == "png"
    first = picture(document["data"][0])
    assert first.size == (10, 8)
    text = {key.removeprefix("qdm-deploy:"): value for key, value in first.info.items()}
    assert text["seed"] == "7"
    assert text["guidance"] == "2.0"
    assert text["bundle_id"] == "ab12"
    assert text["backend"] == "numpy int8"


def test_r3_a_seed_gives_the_same_bytes_alone_and_among_others(served: Any) -> None:
    together = served.generate({"n": 4, "seed": 40, "num_inference_steps": 6}).json()["data"]
    for image in together:
        (alone,) = served.generate({"seed": image["seed"], "num_inference_steps": 6}).json()["data"]
        assert alone == image


def test_without_a_seed_every_request_draws_its_own(served: Any) -> None:
    seeds = {served.generate({"num_inference_steps": 1}).json()["data"][0]["seed"] for _ in range(5)}
    assert len(seeds) == 5
    assert max(seeds) < 2**53


@pytest.mark.parametrize(
    ("wish", "label"),
    [
        ({"prompt": "Boot"}, "boot"),
        ({"prompt": " 1 "}, "bag"),
        ({"prompt": "", "class_label": "shirt"}, "shirt"),
        ({"class_label": 2}, "boot"),
        ({"prompt": "bag", "class_label": 1}, "bag"),
    ],
)
def test_a_label_by_name_or_number(served: Any, wish: dict[str, Any], label: str) -> None:
    images = served.generate({**wish, "n": 2, "num_inference_steps": 2}).json()["data"]
    assert [image["class_label"] for image in images] == [label, label]


def test_a_label_that_is_called_like_the_number_of_another(serve: Any, toy: Any) -> None:
    table = toy.LABELLED.encoder.model_copy(update={"labels": ("2", "1", "0")})
    model = toy.LABELLED.model_copy(update={"components": (toy.LABELLED.denoiser, table)})
    server = serve(toy.ToyEngine(model))
    for given, name in ((0, "2"), ("0", "0"), (1, "1"), (2, "0")):
        answer = server.generate({"class_label": given, "num_inference_steps": 1}).json()
        assert answer["data"][0]["class_label"] == name
    assert server.generate({"class_label": 3}).json()["error"]["param"] == "class_label"


def test_labels_change_the_picture(served: Any) -> None:
    made = [
        np.asarray(picture(served.generate({"prompt": label, "seed": 3}).json()["data"][0]), dtype=float)
        for label in ("shirt", "boot")
    ]
    assert np.abs(made[0] - made[1]).mean() > 5


def test_formats_and_their_quality(served: Any) -> None:
    def make(**wish: Any) -> bytes:
        answer = served.generate({"seed": 1, "num_inference_steps": 3, **wish}).json()
        assert picture(answer["data"][0]).format == answer["output_format"].upper()
        return base64.b64decode(answer["data"][0]["b64_json"])

    for kind in ("webp", "jpeg"):
        fine, coarse = (make(output_format=kind, output_compression=quality) for quality in (100, 5))
        assert len(coarse) < len(fine)
    assert make(output_format="png").startswith(b"\x89PNG")


def test_fields_of_openai_that_mean_nothing_here_are_taken(served: Any) -> None:
    body = {
        "prompt": "bag", "model": "toy", "size": "10x8", "quality": "high", "style": "vivid", "moderation": "low",
        "user": "someone", "background": "auto", "response_format": "b64_json", "n": None, "num_inference_steps": 1,
    }  # fmt: skip
    assert served.generate(body).status_code == 200


def test_a_stream_shows_previews_and_ends_with_each_image(served: Any) -> None:
    wish = {"n": 2, "seed": 11, "num_inference_steps": 8, "stream": True, "partial_images": 3}
    answer = served.generate(wish)
    assert answer.headers["content-type"].startswith("text/event-stream")
    got = events(answer.text)
    assert all(name == data["type"] for name, data in got)
    partial = [data for name, data in got if name == "image_generation.partial_image"]
    completed = [data for name, data in got if name == "image_generation.completed"]
    assert [name for name, _ in got[-2:]] == ["image_generation.completed"] * 2
    for image in (0, 1):
        mine = [data for data in partial if data["image_index"] == image]
        assert [data["partial_image_index"] for data in mine] == [0, 1, 2]
        assert [data["step"] for data in mine] == [2, 4, 6]
        assert picture(mine[0]).size == (10, 8)
    assert [data["seed"] for data in completed] == [11, 12]
    plain = served.generate({key: wish[key] for key in ("n", "seed", "num_inference_steps")}).json()["data"]
    assert [data["b64_json"] for data in completed] == [image["b64_json"] for image in plain]
    # The fields that openai.types.ImageGenCompletedEvent declares.
    wanted = {"b64_json", "background", "created_at", "output_format", "quality", "size", "type", "usage"}
    assert wanted <= completed[0].keys()


def test_a_picture_that_cannot_be_made_ends_a_stream_with_an_event(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any, **options: Any) -> bytes:
        raise RuntimeError("the codec is gone")

    server = serve()
    monkeypatch.setattr("qdm_deploy.serving.http.service.encode_picture", broken)
    for stream in (True, False):
        answer = server.generate({"num_inference_steps": 2, "stream": stream})
        error = events(answer.text)[-1][1]["error"] if stream else answer.json()["error"]
        assert error["code"] == "internal"
        assert answer.headers["x-request-id"] in error["message"]
        assert "codec" not in answer.text
        assert "the codec is gone" in caplog.text
        caplog.clear()


def test_an_unconditional_model_takes_an_empty_prompt_only(serve: Any, toy: Any) -> None:
    server = serve(toy.ToyEngine(toy.PLAIN))
    image = server.generate({"prompt": "", "num_inference_steps": 2}).json()["data"][0]
    assert image["class_label"] is None
    assert picture(image).mode == "RGB"
    for field, value in (("prompt", "a boot"), ("class_label", 1), ("guidance_scale", 2.0)):
        answer = server.generate({field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert "plain" in answer.json()["error"]["message"]

import io

import numpy as np
import pytest
from PIL import Image

from qdm_deploy.errors import InputError
from qdm_deploy.report import ReportPictures


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))


def test_triplets_hold_both_runs_and_their_difference() -> None:
    # 200 - 190 = 10, times 8 is 80; 0 - 255 is cut; uint8 alone would wrap around.
    reference = np.array([[[200, 0]], [[7, 7]]], np.uint8)
    quantized = np.array([[[190, 255]], [[7, 8]]], np.uint8)
    pictures = ReportPictures.from_arrays(reference, quantized, ["one", "two"], quantized_name="openvino")
    first, second = pictures.triplets
    assert pixels(first.reference).tolist() == [[200, 0]]
    assert pixels(first.quantized).tolist() == [[190, 255]]
    assert pixels(first.difference).tolist() == [[80, 255]]
    assert pixels(second.difference).tolist() == [[0, 8]]
    assert (first.caption, second.caption) == ("one", "two")
    assert (pictures.quantized_name, pictures.amplification, pictures.sheet) == ("openvino", 8, None)


def test_colour_and_a_sheet() -> None:
    colour = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    pictures = ReportPictures.from_arrays(colour, colour, ["same"], sheet=colour[0], amplification=2)
    assert pixels(pictures.triplets[0].quantized).tolist() == colour[0].tolist()
    assert not pixels(pictures.triplets[0].difference).any()
    assert pictures.sheet is not None
    assert pixels(pictures.sheet).tolist() == colour[0].tolist()


def test_what_does_not_belong_together_is_refused() -> None:
    two, three = np.zeros((2, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(InputError, match=r"shape \[2, 4, 4\] and \[3, 4, 4\] with 2 captions"):
        ReportPictures.from_arrays(two, three, ["a", "b"])
    with pytest.raises(InputError, match=r"shape \[2, 4, 4\] and \[2, 4, 4\] with 1 captions"):
        ReportPictures.from_arrays(two, two, ["a"])
    with pytest.raises(InputError, match="an amplification of 0 would hide differences"):
        ReportPictures.from_arrays(two, two, ["a", "b"], amplification=0)

"""What a text encoder of a bundle makes of a text: a state for each token, float32, on the CPU."""

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import TextEncoder
from qdm_deploy.backends.onnxruntime.session import session_options
from qdm_deploy.components.prompts import PromptOptions, weighted_parts
from qdm_deploy.components.tokenizer import PromptTokenizer
from qdm_deploy.errors import BundleError, CheckFailed, EnvironmentProblem, InputError
from qdm_deploy.runtime.cpu import available_cores

__all__ = ["TextStates"]

_LOG = logging.getLogger(__name__)
# Texts whose states are kept; those of SDXL's wider encoder for three chunks take 75 MiB then.
_KEPT = 64


class TextStates:
    """A text encoder with its tokenizer, and the states of the texts that it met last.

    A text is encoded on its own, so its states have the same bits whatever it is asked for with. May be used by several
    threads.

    Args:
        root: the bundle's folder.
        spec: the text encoder.
        chunks: rows of ``input_ids`` that a text is spread over, as long as the condition is.
        threads: of ONNX Runtime; None takes the cores this process may use.

    Raises:
        BundleError: the graph or the tokenizer cannot be read, or is not what ``spec`` says.
        EnvironmentProblem: onnxruntime or tokenizers cannot be imported.
    """

    def __init__(self, root: Path, spec: TextEncoder, chunks: int = 1, *, threads: int | None = None) -> None:
        self.spec, self._chunks = spec, chunks
        self._tokenizer = PromptTokenizer(root / spec.tokenizer / "tokenizer.json", spec)
        self._session = _opened(root / spec.name / "model.onnx", spec, threads)
        self._kept: OrderedDict[tuple[str, PromptOptions], NDArray[np.float32]] = OrderedDict()
        self._lock = threading.RLock()

    def of(self, text: str, options: PromptOptions) -> NDArray[np.float32]:
        """States of a text, [chunks * max_length, width] float32, not to be written to.

        A text that is too long is cut, and a warning says what was left out.

        Raises:
            InputError: the text cannot be read.
            CheckFailed: a state became NaN or infinite.
        """
        with self._lock:
            states = self._kept.get((text, options))
            if states is None:
                states = self._encoded(text, options)
                states.setflags(write=False)
                self._kept[text, options] = states
            self._kept.move_to_end((text, options))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return states

    def _encoded(self, text: str, options: PromptOptions) -> NDArray[np.float32]:
        parts = weighted_parts(text) if options.weighting else [(text, 1.0)]
        tokens: list[int] = []
        weights: list[float] = []
        for part, weight in parts:
            found = self._tokenizer.tokens(part)
            tokens += found
            weights += [weight] * len(found)
        room = self._tokenizer.room * self._chunks
        if len(tokens) > room:
            _LOG.warning(
                "%s reads %d tokens of a prompt, and this one has %d; left out: %r",
                self.spec.name,
                room,
                len(tokens),
                self._tokenizer.text(tokens[room:]),
            )
        states = self._run(self._tokenizer.rows(tokens, self._chunks), text, options)
        if any(weight != 1 for weight in weights[:room]):
            # Away from what an empty text gives (ComfyUI's sd1_clip.py): a weight of 0 is as if the token were not
            # there.
            empty = self.of("", options)
            states = empty + (states - empty) * self._along_tokens(weights)
            self._check_finite(states, text, "the weighted states")
        return states

    def _run(self, rows: NDArray[np.int64], text: str, options: PromptOptions) -> NDArray[np.float32]:
        output = "penultimate_hidden_state" if options.clip_skip else "last_hidden_state"
        if output not in self.spec.outputs:
            raise InputError(f"{self.spec.name} cannot leave out a layer; set clip_skip to 0")
        states: NDArray[np.float32] = self._session.run([output], {"input_ids": rows})[0]
        self._check_finite(states, text, output)
        return states.reshape(-1, self.spec.width)

    def _along_tokens(self, weights: list[float]) -> NDArray[np.float32]:
        """Weights of all positions, [chunks * max_length, 1]: 1 for those that are no token of the text."""
        room = self._tokenizer.room
        along = np.ones((self._chunks, self.spec.max_length), np.float32)
        for i, row in enumerate(along):
            part = weights[i * room : (i + 1) * room]
            row[1 : 1 + len(part)] = part
        return along.reshape(-1, 1)

    def _check_finite(self, states: NDArray[np.float32], text: str, output: str) -> None:
        if not np.isfinite(states).all():
            raise CheckFailed(
                f"the text encoder {self.spec.name} made NaN or infinity in {output} of the prompt {text[:60]!r}: its "
                "weights or this machine are broken; verify the bundle"
            )


def _opened(graph: Path, spec: TextEncoder, threads: int | None) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EnvironmentProblem(
            f"text encoders run on onnxruntime, which cannot be imported ({error}): "
            "pip install --force-reinstall onnxruntime"
        ) from error
    if not graph.is_file():
        raise BundleError(f"there is no text encoder {graph}; verify the bundle, or build it again")
    options = session_options()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {error}. Verify the bundle") from error
    inputs = [(item.name, item.type, item.shape[1:]) for item in session.get_inputs()]
    outputs = {item.name: item.shape[1:] for item in session.get_outputs()}
    shapes = {name: [spec.width] if name == "pooled" else [spec.max_length, spec.width] for name in spec.outputs}
    if inputs != [("input_ids", "tensor(int64)", [spec.max_length])] or outputs != shapes:
        raise BundleError(
            f"{graph} takes {inputs} and gives {outputs}; its manifest says input_ids [B, {spec.max_length}] and "
            f"{shapes}: build the bundle again"
        )
    return session

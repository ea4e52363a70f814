"""The page that lies in an exported Triton repository: what a client has to send, and what holds for it."""

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.pipeline.triton_config import step_tensors

__all__ = ["readme"]

_MEANING = {
    "sample": "the noisy image; unit Gaussian noise at the first step, then `next_sample` of the step before",
    "timestep": "training timestep of the step",
    "coefficients": "row of the sampler's table: `qdm_deploy.samplers.step_table(...).coefficients[step]`",
    "noise": "unit Gaussian noise; zeros for samplers that add none",
    "history": "`next_history` of the step before; zeros at the first",
    "guidance_rescale": "how far a guided output takes back the spread of the unguided one; 0 is none",
    "guidance": "scale of classifier-free guidance; 1 is none",
    "unconditional_offset": "distance to the row's unconditional twin: 0 without guidance; else 1, and 0 in the twin",
    "owner_offset": "distance to the row whose state it takes: 0; -1 in the twin",
}


_CONDITION = "what the image should show; what the model takes for nothing in the unconditional row"


def readme(bundle: Bundle, name: str, backend: str, max_batch: int) -> str:
    """The text of ``README.md``.

    Args:
        bundle: the exported bundle.
        name: the model of the repository.
        backend: "onnxruntime" or "tensorrt".
        max_batch: rows that Triton may put together.
    """
    inputs, outputs = step_tensors(bundle.pipeline.interface)
    rows = "\n".join(
        f"| `{item.name}` | {item.dtype} | [B, {', '.join(map(str, item.shape or (1,)))}] "
        f"| {_MEANING.get(item.name, _CONDITION)} |"
        for item in inputs
    )
    parts = [
        f"# {bundle.pipeline.name}: denoising step for Triton Inference Server",
        f"Written by `qdm-deploy export-triton` from the bundle {bundle.id[:16]}.",
        _start(name, backend),
        "One request is one denoising step of one or more images. Triton sees no sampler: the client sends the rows "
        "of the step table and feeds the result back.\n\n"
        f"| input | type | shape | what |\n|---|---|---|---|\n{rows}\n\n"
        "Outputs: "
        + ", ".join(f"`{item.name}` [B, {', '.join(map(str, item.shape))}] {item.dtype}" for item in outputs)
        + ".",
        _batching(bundle.pipeline.conditional, max_batch),
    ]
    parts.append(
        "## Checked\n\nThe configuration was held against Triton's `model_config.proto`, and the graph was run with "
        "ONNX Runtime. It was not loaded into a Triton server: try it in yours before you rely on it."
    )
    return "\n\n".join(parts) + "\n"


def _start(name: str, backend: str) -> str:
    if backend == "onnxruntime":
        return "    tritonserver --model-repository=/path/to/this/folder\n\nRuns on the CPU, by Triton's ONNX Runtime."
    return (
        "A TensorRT plan is native code for one version of TensorRT and one kind of GPU, so there is none here. Build "
        f"it on the target machine, in the container that serves it:\n\n    ./{name}/build_plan.sh\n"
        "    tritonserver --model-repository=/path/to/this/folder"
    )


def _batching(conditional: bool, max_batch: int) -> str:
    text = (
        f"## Batching\n\nTriton puts waiting requests together, up to {max_batch} rows. Requests at different steps, "
        "with other samplers and step counts may share a batch, because all of that is per row."
    )
    if not conditional:
        return text
    return text + (
        " The graph of the bundle links rows by their index in the batch, which concatenation would break; the graph "
        "here takes distances between rows instead, so a guided image may share a batch too. Its two rows must be "
        "neighbours in one request, own row first. An offset that leads out of a request reads another client's row, "
        "or fails the whole batch: do not let strangers set offsets."
    )

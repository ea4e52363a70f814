"""One ONNX step graph to one serialized engine, for TensorRT and TensorRT-RTX alike.

The network is strongly typed: precision is what the graph says, and the graph says INT8 only by Q/DQ pairs. The batch
axis is the only dynamic one. Everything here runs inside the build process (``worker``), because the builder is native
code that can end the process it runs in.

Source: NvInfer.h (IBuilderConfig, IOptimizationProfile), NvOnnxParser.h; TensorRT 10 and 11, TensorRT-RTX 1.7.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from qdm_deploy.artifacts.files import new_file
from qdm_deploy.engines.flavour import Flavour, flavour_of
from qdm_deploy.engines.request import BatchProfile, BuildRequest
from qdm_deploy.errors import EngineError, EnvironmentProblem, ResourceProblem

__all__ = ["Announce", "build_plan"]

# What is said of a build's progress: the name of a phase, how many steps it has (0: unknown) and how many are done.
Announce = Callable[[str, int, int], None]

_ADVICE = (
    ("Plugin not found", "TensorRT has no importer for this operator; export it as operators TensorRT knows"),
    (
        "Attention operation was not supported",
        "no fused kernel runs this Attention operator; emit it in float16, or as MatMul",
    ),
    ("must all be positive", "a scale is zero or negative; raise it to a small normal float16 value in the plan"),
    ("zero point is not supported", "shift the values with a Sub before QuantizeLinear and keep its zero point 0"),
    ("must have same input types", "nothing is cast implicitly here; emit both operands in one type, or add a Cast"),
    ("ut of memory", "the builder ran out of memory; lower the largest batch of the profile or the workspace limit"),
)


def build_plan(request: BuildRequest, announce: Announce) -> float:
    """Build the engine that ``request`` describes and write its plan, log and layer list.

    Args:
        request: Graph, target, profile, options and the files to write.
        announce: Called with each outer phase as it starts and after each of its steps.

    Returns:
        Seconds from the first byte parsed to the plan in memory.

    Raises:
        EnvironmentProblem: The library or its GPU is missing.
        EngineError: The graph cannot be parsed or the engine cannot be built.
    """
    flavour = flavour_of(request.backend)
    library = flavour.load()
    with request.log.open("a", encoding="utf-8", buffering=1) as stream:
        logger = _logger(library, stream)
        builder = _builder(library, logger, flavour)
        started = time.perf_counter()
        announce("parsing the graph", 0, 0)
        network = _parsed(library, builder, logger, request.graph)
        config = _config(library, builder, flavour, request, announce)
        config.add_optimization_profile(_profile(builder, network, request))
        announce("building", 0, 0)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _failure(request.graph, logger.errors)
        seconds = time.perf_counter() - started
        request.plan.write_bytes(memoryview(plan))
        if flavour.timing_cache and request.timing_cache is not None:
            with new_file(request.timing_cache) as path:
                path.write_bytes(memoryview(config.get_timing_cache().serialize()))
        if flavour.inspects:
            announce("inspecting the engine", 0, 0)
            request.layers.write_text(_inspected(library, logger, plan, request.profile), encoding="utf-8")
    return seconds


def _logger(library: Any, stream: TextIO) -> Any:
    class Log(library.ILogger):  # type: ignore[misc]  # the base class comes from an untyped native module
        """Writes every line to the log file and keeps the errors."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            stream.write(f"{severity.name} {message}\n")
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)

    return Log()


def _builder(library: Any, logger: Any, flavour: Flavour) -> Any:
    try:
        return library.Builder(logger)
    except TypeError as error:  # what the binding raises when the native constructor returns null
        reason = "; ".join(logger.errors) or str(error)
        raise EnvironmentProblem(
            f"{flavour.backend} {library.__version__} cannot start on this machine ({reason}); check that the GPU, "
            "its driver and the CUDA version of the installed wheel fit together"
        ) from error


def _parsed(library: Any, builder: Any, logger: Any, graph: Path) -> Any:
    # TensorRT 10 is weakly typed unless told otherwise; 11 and RTX know nothing else and ignore the flag.
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    # From the file and not from bytes: external data is found beside it.
    if not parser.parse_from_file(str(graph)):
        problems = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise _failure(graph, problems or logger.errors)
    return network


def _parser_error(error: Any) -> str:
    operator, node = error.node_operator(), error.node_name()
    where = f"node '{node}' ({operator}): " if node else ""
    return f"{where}{error.desc()}"


def _config(library: Any, builder: Any, flavour: Flavour, request: BuildRequest, announce: Announce) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # as above
        """Passes the outer two levels of phases on; the inner ones come by the thousand."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.outermost: str | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = name
            if parent in (None, self.outermost):
                self.steps[name] = steps
                announce(name.lower(), steps, 0)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.steps:
                announce(name.lower(), self.steps[name], min(step + 1, self.steps[name]))
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    config = builder.create_builder_config()
    config.progress_monitor = Monitor()
    config.profiling_verbosity = (
        library.ProfilingVerbosity.DETAILED
    )  # without it the engine's layers have no names or types
    # On by default, and float32 products would have the 10 bits of a float16's fraction.
    config.clear_flag(library.BuilderFlag.TF32)
    config.builder_optimization_level = request.options.optimization_level
    if request.options.workspace_bytes is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, request.options.workspace_bytes)
    if request.options.auxiliary_streams is not None:
        config.max_aux_streams = request.options.auxiliary_streams
    if request.sm is not None:
        _set_capability(library, config, flavour, request.sm)
    if flavour.timing_cache and request.timing_cache is not None:
        _set_timing_cache(config, request.timing_cache)
    return config


def _set_capability(library: Any, config: Any, flavour: Flavour, sm: str) -> None:
    known = library.ComputeCapability.__members__
    name = "SM" + sm.replace(".", "")
    if name not in known:
        raise EnvironmentProblem(
            f"{flavour.backend} {library.__version__} cannot build for compute capability '{sm}' yet; "
            f"pip install --upgrade 'qdm-deploy[{flavour.extra}]'"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)


def _set_timing_cache(config: Any, path: Path) -> None:
    # A cache that does not fit this library and GPU is refused by it; the build then starts an empty one.
    for kept in (path.read_bytes() if path.exists() else b"", b""):
        timings = config.create_timing_cache(kept)
        if timings is not None and config.set_timing_cache(timings, False):
            return


def _profile(builder: Any, network: Any, request: BuildRequest) -> Any:
    batches: BatchProfile = request.profile
    profile = builder.create_optimization_profile()
    dynamic = 0
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise EngineError(
                f"input '{tensor.name}' of {request.graph} has the shape {shape}: only its first axis, the batch, may "
                "be dynamic (-1); export the graph with every other size fixed"
            )
        if shape[:1] == (-1,):
            dynamic += 1
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in (batches.min, batches.opt, batches.max)))
    if not dynamic:
        raise EngineError(
            f"no input of {request.graph} has a dynamic batch axis, so the batch profile {batches} cannot be served; "
            "export the graph with a symbolic batch size"
        )
    return profile


def _inspected(library: Any, logger: Any, plan: Any, profile: BatchProfile) -> str:
    engine = library.Runtime(logger).deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise EngineError(
            "the engine was built and cannot be loaded again: " + ("; ".join(logger.errors) or "no reason given")
        )
    # Without shapes TensorRT 10 says "N/A due to dynamic shapes" for the type of what a kernel reads.
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT:
            context.set_input_shape(name, (profile.opt, *tuple(engine.get_tensor_shape(name))[1:]))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    information: str = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return information


def _failure(graph: Path, problems: list[str]) -> EngineError | ResourceProblem:
    # Cross-building works without a GPU; that its driver is missing is noise beside the true reason.
    lines = [line for problem in problems for line in problem.strip().splitlines() if "cudaError 35" not in line]
    text = "\n  ".join(dict.fromkeys(lines)) or "the builder gave no reason"
    advice = next((what for sign, what in _ADVICE if sign in text), "the builder's log has the steps before it")
    kind = ResourceProblem if "ut of memory" in text else EngineError
    return kind(f"no engine could be built from {graph}:\n  {text}\n{advice}")

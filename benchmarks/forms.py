"""One thing switched, everything else equal: what it does to the output, to a step, and to an engine's kernels.

The graphs of a switch are emitted from plans of the same calibration. Those for CPUs are timed in turn, each in a
process of its own; `faster` compares with the first, within turns. Those for TensorRT are not timed: a TensorRT-RTX
engine, which needs no GPU, counts their kernels where that module is installed. `eps SQNR dB` is teacher-forced
against the float model.

    python benchmarks/forms.py --list
    python benchmarks/forms.py --switch parts --save zen5
    python benchmarks/forms.py --switch rest --target tensorrt
    python benchmarks/forms.py --switch concat --target onnxruntime --models cifar10 --mode latency --runs 100
"""

from pathlib import Path

from lib.case import Case
from lib.contest import Contender, contest, contest_parser
from lib.switches import SWITCHES, contenders_of


def main() -> None:
    arguments = contest_parser(__doc__, models="fashion", runs=50)
    arguments.add_argument("--switch", choices=SWITCHES, metavar="NAME", help="one of --list")
    arguments.add_argument("--list", action="store_true", help="say what can be switched, and stop")
    arguments.add_argument(
        "--target", choices=("openvino", "onnxruntime", "tensorrt"), help="by default the switch's first"
    )
    arguments.add_argument("--mode", choices=("throughput", "latency"), default="throughput", help="of CPU sessions")
    arguments.add_argument("--sm", default="8.9", help="compute capability of the engines")
    given = arguments.parse_args()
    if given.list:
        for name, switch in SWITCHES.items():
            print(f"{name:<16} {switch.about} [{', '.join(switch.targets)}]")
        return
    if given.switch is None:
        arguments.error("--switch is missing; --list says what can be switched")
    switch = SWITCHES[given.switch]
    target = given.target or switch.targets[0]
    if target not in switch.targets:
        arguments.error(f"--switch {given.switch} has no {target}; choose from {', '.join(switch.targets)}")

    def contenders(model: Case, folder: Path) -> dict[str, Contender]:
        return contenders_of(switch.variants(model, target), folder, mode=given.mode, sm=given.sm)

    contest(f"forms-{given.switch}-{target}", given, contenders)


if __name__ == "__main__":
    main()

"""The command line of the export: a distilled checkpoint becomes the stock student."""

from __future__ import annotations

from collections.abc import Sequence

from kd_det.app.arguments import config_parser, reports_mistakes
from kd_det.hosts.base import get_host, load_config

_DESCRIPTION = "Strip a distilled checkpoint to the stock student."
_EXAMPLE = """\
example:
  %(prog)s --config-file outputs/run/config.yaml \\
      --weights outputs/run/model_final.pth --output outputs/run/student"""


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the student's weights and config. Returns 2 for a mistake in the input."""
    parser = config_parser(_DESCRIPTION, _EXAMPLE, prog)
    parser.add_argument("--weights", required=True, metavar="FILE", help="the run's checkpoint")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="for model.pth and config.yaml"
    )
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    model, config = get_host(cfg.HOST).export_student(cfg, args.weights, args.output)
    print(f"student weights: {model}\nstudent config:  {config}")
    return 0

"""`python -m launcher.emulator`: reads the command line and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fault.errors import MayflyError
from launcher.emulator.functions import read_functions
from launcher.emulator.server import Address, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after SIGTERM or SIGINT."""
    gc.freeze()  # modules stay: they need not be looked through, least of all at the end
    parser = argparse.ArgumentParser(prog="python -m launcher.emulator", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the functions, as JSON")
    parser.add_argument("--listen", default="127.0.0.1:0", help="a loopback address and a port")
    parser.add_argument("--ready-file", type=Path, help='gets {"endpoint": URL, "pid": N}')
    parser.add_argument("--log-dir", type=Path, required=True, help="a log for each sandbox")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        functions = read_functions(options.config)
        address = Address.parse(options.listen)
        asyncio.run(serve(functions, address, options.ready_file, options.log_dir))
    except MayflyError as error:
        print(f"emulator: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

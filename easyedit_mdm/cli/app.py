"""What `easyedit-mdm app` does."""

from __future__ import annotations

import os

from rich.console import Console


def serve(port: int | None = None, inbrowser: bool = False) -> None:
    """Serve the page on 127.0.0.1 until it is interrupted. Nothing is reported to anybody.

    Raises:
        FileError: if the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from easyedit_mdm.app.blocks import launch
    from easyedit_mdm.errors import FileError

    try:
        page = launch(port, inbrowser, block=False)
    except OSError as error:
        which = "no port is free" if port is None else f"port {port} is taken"
        raise FileError(f"the page cannot be served: {which}. Give another --port") from error
    Console().print(f"easyedit_mdm is at {page.local_url} (Ctrl-C ends it)", highlight=False)
    page.block_thread()

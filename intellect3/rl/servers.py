"""The list of a run's inference servers, which may change while the run goes.

    RUN/servers.txt     one url a line; `#` begins a comment

The orchestrator writes it when it starts, from `rl.run.server_urls` (or what it started itself),
and looks at it every few seconds. To add a server, start it and put its url in; to take one away,
take its url out: what runs there ends there, new requests go elsewhere. Replace the file by a
rename (`mv`), so that it is never seen half written.
"""

import logging
import pathlib
from collections.abc import Sequence

from intellect3.rl import checks

logger = logging.getLogger(__name__)

FILE = "servers.txt"


class ServerList:
  """The list as of now; call it."""

  def __init__(self, run_dir: pathlib.Path, urls: Sequence[str], orchestrator_url: str) -> None:
    """Writes the file.

    Args:
      run_dir: of the run.
      urls: the servers to begin with.
      orchestrator_url: an address that no server may have.
    """
    self._path = run_dir / FILE
    self._orchestrator_url = orchestrator_url
    self._urls = tuple(urls)
    self._refused = ""
    text = "# The inference servers of this run, one url a line. Changes are seen in seconds.\n"
    temporary = self._path.with_suffix(".tmp")
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text + "".join(f"{url}\n" for url in urls))
    temporary.rename(self._path)

  def __call__(self) -> Sequence[str]:
    """The urls in the file; those it had before where it cannot be read or is not fit."""
    try:
      text = self._path.read_text()
      urls = parse(text, self._orchestrator_url)
    except (OSError, ValueError) as error:
      if str(error) != self._refused:
        self._refused = str(error)
        logger.error("%s is not taken: %s", self._path, error)
      return self._urls
    self._urls, self._refused = urls, ""
    return urls


def parse(text: str, orchestrator_url: str) -> tuple[str, ...]:
  """The urls of a list; raises NotStarted (a ValueError) naming the one that is none."""
  lines = (line.partition("#")[0].strip() for line in text.splitlines())
  urls = tuple(line.rstrip("/") for line in lines if line)
  checks.addresses(orchestrator_url, urls)
  return urls

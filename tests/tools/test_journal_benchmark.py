"""The journal's benchmark measures what it says: bytes where one is written, none elsewhere."""

import json

from tools.benchmarks import journal


def test_it_writes_its_figures(tmp_path, capsys):
  out = tmp_path / "figures.json"
  sizes = ["--rollouts", "8", "--tokens", "16", "--repetitions", "1", "--effects", "0"]
  assert journal.main([*sizes, "--json", str(out)]) == 0
  figures = json.loads(out.read_text())["figures"]
  assert figures["none"]["bytes"] == figures["later"]["bytes"] == 0
  assert figures["segments"]["bytes"] > 4 * 16 * 12  # four segments of ids, logprobs and versions
  assert "segments" in capsys.readouterr().out

"""docs/faults.md names tests that exist, and every test of the network's faults."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def named() -> set[tuple[Path, str]]:
    """File and name of each test in the tables: `` `file`: `test_a`, `test_b` ``."""
    found = set()
    for row in (ROOT / "docs/faults.md").read_text().splitlines():
        for name, tests in re.findall(r"`([a-z_/]+)`: ((?:`test_\w+`(?:, )?)+)", row):
            folder, _, stem = name.rpartition("/")
            path = ROOT / "tests" / (folder or "integration") / f"test_{stem}.py"
            found |= {(path, test) for test in re.findall(r"test_\w+", tests)}
    return found


def test_every_test_in_the_table_exists() -> None:
    tests = named()
    assert len(tests) > 50
    missing = [f"{path.name}: {test}" for path, test in sorted(tests) if f"def {test}(" not in path.read_text()]
    assert not missing


def test_every_test_of_faults_is_in_the_table() -> None:
    listed = {test for _, test in named()}
    for name in ("test_network_faults.py", "test_stream_network.py", "test_stream_time.py"):
        text = (ROOT / "tests/integration" / name).read_text()
        assert set(re.findall(r"def (test_\w+)\(", text)) <= listed

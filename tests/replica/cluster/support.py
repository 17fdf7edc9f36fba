"""What the tests of cluster files share."""

from pathlib import Path

from replica.cluster.provision import init_cluster


def make_cluster(path: Path, f: int = 1, **options) -> Path:
    init_cluster(path, f=f, **{"base_port": 7100, **options})
    return path


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new, 1))

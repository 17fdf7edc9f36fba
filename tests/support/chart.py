"""The chart, rendered by Helm's own library; what it needs is in tests/deploy/tools.lock, which `make test-chart` installs."""

from pathlib import Path

import pytest

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "trustlog"
RELEASE, NAMESPACE = "trustlog", "here"


def helm():
    return pytest.importorskip("helm_python.chart", reason="Helm's library is not installed: run make test-chart")


def render(values=None) -> dict[str, dict]:
    """Return the objects by their kind; there is one of each."""
    yaml = pytest.importorskip("yaml")
    with helm().Chart.load(CHART) as chart:
        texts = chart.render(values or {}, name=RELEASE, namespace=NAMESPACE)
    objects = [one for name, text in texts.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text) if one]
    assert len({one["kind"] for one in objects}) == len(objects)
    return {one["kind"]: one for one in objects}

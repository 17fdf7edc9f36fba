"""Links between the documents lead somewhere."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_relative_link_leads_to_a_file():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pages = [ROOT / name for name in listed.stdout.splitlines()]
    links = [
        (page, target.split("#")[0])
        for page in pages
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if "://" not in target and not target.startswith("#")
    ]
    assert len(links) >= 8
    assert [
        f"{page.relative_to(ROOT)}: {target}" for page, target in links if not (page.parent / target).exists()
    ] == []

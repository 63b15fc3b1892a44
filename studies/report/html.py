"""Pages of HTML that work offline, in light and dark, on a desk and on a phone: templates, filled in."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import plotly.io as pio
from plotly.offline import get_plotlyjs

from searchspace.disk import write_file
from studies.report.figures import Figures


def write_page(file: Path, template: str, figures: Figures, **values: Any) -> Path:
    """Fill in a template.

    Args:
        file: to be written, whole or not at all.
        template: of the folder ``templates``.
        figures: drawn where it has an element of their name.
        values: what else it asks for.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    page = jinja2.Environment(loader=loader, autoescape=True).get_template(template)
    text = page.render(
        **values,
        figures=figures,
        figures_json=_json(figures),
        plotlyjs=get_plotlyjs(),
        versions=", ".join(f"{name} {version(name)}" for name in ("spiralformer", "torch", "optuna")),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_file(file, text)
    return file


def _json(figures: Figures) -> str:
    """Nothing in it ends the script element it stands in."""
    parts = {name: json.loads(pio.to_json(figure, validate=False)) for name, figure in figures.items()}
    return json.dumps(parts).replace("<", "\\u003c")

"""Write a report: its data, a page, a summary."""

from __future__ import annotations

from pathlib import Path

from sdrt.benchmarks.document.document import Document, to_json
from sdrt.benchmarks.report.page import page
from sdrt.benchmarks.report.summary import summary
from sdrt.runtime.errors import OutputError
from sdrt.runtime.system.files import explain, write_all_atomically

JSON, MARKDOWN, HTML = "report.json", "report.md", "index.html"


def write_report(document: Document, folder: Path, *, with_page: bool = True) -> None:
    """Write ``report.json``, ``report.md`` and the page ``index.html`` to a folder, all or none of them.

    Raises:
        OutputError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {explain(error)}") from error
    texts = {JSON: to_json(document) + "\n", MARKDOWN: summary(document)}
    if with_page:
        texts[HTML] = page(document)
    # A command line may hold bytes that are no UTF-8, as lone surrogates; JSON reads their escape back.
    write_all_atomically(
        {folder / name: text.encode(errors="backslashreplace") for name, text in texts.items()}
    )

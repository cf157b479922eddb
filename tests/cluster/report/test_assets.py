"""The library that reports carry: which it is, and that nothing in it was changed.

To take another: `npm pack plotly.js-basic-dist-min@VERSION`, then `gzip -9 -n` of its plotly-basic.min.js into
cluster/report/assets, its LICENSE as plotly-LICENSE, and version and checksum here.
"""

import gzip
import hashlib

from cluster.report.report import ASSETS

VERSION = "4.1.1"
CHECKSUM = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"


def test_the_charts_library_is_the_published_one():
    library = gzip.decompress((ASSETS / "plotly-basic.min.js.gz").read_bytes())
    assert hashlib.sha256(library).hexdigest() == CHECKSUM
    assert f"plotly.js (basic - minified) v{VERSION}" in library[:200].decode()
    assert (ASSETS / "plotly-LICENSE").read_text().startswith("MIT License")

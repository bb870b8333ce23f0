"""The web console as the edge serves it."""

import re

import httpx

from tests.support.mesh import Mesh

MOST_BYTES = 60_000
FILES = ("app.js", "api.js", "fleet.js", "page.js", "playground.js", "requests.js", "usage.js", "style.css", "icon.svg")


def test_it_is_small_runs_nothing_from_elsewhere_and_may_not_be_framed(uneven_mesh: Mesh) -> None:
    with httpx.Client(base_url=uneven_mesh.edge, timeout=5) as anybody:
        answers = [anybody.get("/"), *(anybody.get(f"/console/{name}") for name in FILES)]
        for answer in answers:
            assert answer.status_code == 200
            assert "script-src 'self'" in answer.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            links = set(re.findall(r"https?://[\w./]+", answer.text))
            assert links <= {"http://www.w3.org/2000/svg"}
            assert "innerHTML" not in answer.text
        assert sum(len(answer.content) for answer in answers) < MOST_BYTES
        again = anybody.get("/", headers={"if-none-match": answers[0].headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert anybody.head("/").status_code == 200
        assert anybody.post("/").status_code == 405
        assert anybody.get("/console/nope.js").json()["error"]["code"] == "unknown_url"
        assert anybody.get("/console/").status_code == 404

"""Every route, API and console, asked by everybody: what each is answered stands in the tables below.

A row is a method, a path, what it needs, and what whoever may ask is answered. Requests are the least that passes the
checks of access, and change nothing: they expect a generation that the buffer does not have, send an empty upload, name
what is not there. A route without a row fails here.

    needs           open to      otherwise
    open            everybody
    read            all tokens
    write, admin    those scopes and above                                              403
    ... everything  ... whose tokens have no prefix                                     403

Without a good token the API answers 401 and the console leads to the login (303). A token of another prefix is answered
403 where the path names a buffer, 404 where it names an ingest or a pack of one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from engram_service import sessions, tokens
from engram_service.access import TABLE, Access, Row
from engram_service.sessions import COOKIE
from engram_service.settings import Settings
from engram_service.tables import TokenRow
from tests.contents import create, fill
from tests.servers import ADMIN_TOKEN, ServiceThread

API = """
GET    /healthz                                                open             200
GET    /readyz                                                 open             200
GET    /docs                                                   open             200
GET    /redoc                                                  open             200
GET    /openapi.json                                           open             200
GET    /docs/files/{file}                                      open             200
GET    /metrics                                                read everything  200
GET    /v1/whoami                                              read             200
GET    /v1/buffers                                             read             200
POST   /v1/buffers                                             admin            409
GET    /v1/buffers/{buffer}                                    read             200
PATCH  /v1/buffers/{buffer}                                    write            409
DELETE /v1/buffers/{buffer}                                    admin            409
POST   /v1/buffers/{buffer}/forks                              admin            409
GET    /v1/buffers/{buffer}/manifest                           read             200
GET    /v1/buffers/{buffer}/forecast                           read             200
GET    /v1/buffers/{buffer}/histogram                          read             200
GET    /v1/buffers/{buffer}/draw                               read             200
GET    /v1/buffers/{buffer}/export                             read             200
GET    /v1/buffers/{buffer}/exemplars                          read             200
DELETE /v1/buffers/{buffer}/exemplars                          write            409
PATCH  /v1/buffers/{buffer}/exemplars                          write            409
GET    /v1/buffers/{buffer}/exemplars/{pack}/{row}             read             200
DELETE /v1/buffers/{buffer}/exemplars/{pack}/{row}             write            409
PATCH  /v1/buffers/{buffer}/exemplars/{pack}/{row}             write            409
GET    /v1/buffers/{buffer}/exemplars/{pack}/{row}/fields      read             200
GET    /v1/buffers/{buffer}/exemplars/{pack}/{row}/qualities   read             200
GET    /v1/buffers/{buffer}/tasks/{task}                       read             200
DELETE /v1/buffers/{buffer}/tasks/{task}                       write            409
GET    /v1/buffers/{buffer}/tasks/{task}/decision              read             200
GET    /v1/buffers/{buffer}/tasks/{task}/map                   read             422
POST   /v1/buffers/{buffer}/tasks/{task}/ingests               write            422
GET    /v1/packs/{sha256}                                      read             200
GET    /v1/ingests                                             read             200
GET    /v1/ingests/{ingest_id}                                 read             200
DELETE /v1/ingests/{ingest_id}                                 write            409
POST   /v1/ingests/{ingest_id}/retry                           write            409
GET    /v1/extractors                                          read             200
GET    /v1/extractors/{sha256}                                 read             404
PUT    /v1/extractors/{sha256}                                 write            422
DELETE /v1/extractors/{sha256}                                 admin everything 404
GET    /v1/draws                                               read             200
GET    /v1/disk                                                admin everything 200
GET    /v1/audit                                               admin            200
GET    /v1/tokens                                              admin everything 200
POST   /v1/tokens                                              admin everything 422
DELETE /v1/tokens/{token_id}                                   admin everything 404
"""

CONSOLE = """
GET    /console/static/{rest:path}                             open             200
GET    /console/login                                          open             200
POST   /console/login                                          open             401
POST   /console/logout                                         read             303
GET    /console                                                read             200
GET    /console/tokens                                         admin everything 200
POST   /console/tokens                                         admin everything 422
POST   /console/tokens/{token_id}/revoke                       admin everything 404
GET    /console/audit                                          admin            200
POST   /console/buffers                                        admin            422
GET    /console/buffers/{buffer}                               read             200
POST   /console/buffers/{buffer}/budget                        admin            422
POST   /console/buffers/{buffer}/delete                        admin            422
POST   /console/buffers/{buffer}/forks                         admin            422
GET    /console/buffers/{buffer}/snapshots                     read             200
GET    /console/buffers/{buffer}/compare                       read             422
GET    /console/buffers/{buffer}/forecast                      read             200
GET    /console/buffers/{buffer}/classes                       read             200
POST   /console/buffers/{buffer}/classes                       write            303
POST   /console/buffers/{buffer}/tasks/{task}/delete           write            422
GET    /console/draws                                          read             200
GET    /console/extractors                                     read             200
POST   /console/extractors/{sha256}/delete                     admin everything 404
GET    /console/ingests                                        read             200
GET    /console/ingests/{ingest_id}                            read             200
POST   /console/ingests/{ingest_id}/cancel                     write            409
POST   /console/ingests/{ingest_id}/retry                      write            409
GET    /console/buffers/{buffer}/exemplars                     read             200
POST   /console/buffers/{buffer}/exemplars/relabel             write            422
POST   /console/buffers/{buffer}/exemplars/remove              write            422
GET    /console/buffers/{buffer}/exemplars/{pack}/{row}        read             200
GET    /console/buffers/{buffer}/exemplars/{pack}/{row}/picture read            200
GET    /console/buffers/{buffer}/histograms                    read             200
GET    /console/buffers/{buffer}/packs/{pack}/picture          read             200
GET    /console/buffers/{buffer}/tasks/{task}                  read             200
GET    /console/buffers/{buffer}/tasks/{task}/map              read             200
GET    /console/buffers/{buffer}/tasks/{task}/originals/{number} read           404
"""

BODIES = {
    "POST /v1/buffers": {"name": "lab-1", "budget_bytes": 1},
    "PATCH /v1/buffers/{buffer}": {"class_names": {"0": "zero"}},
    "POST /v1/buffers/{buffer}/forks": {"name": "lab-1"},
    "PATCH /v1/buffers/{buffer}/exemplars": {"class_id": 5},
    "PATCH /v1/buffers/{buffer}/exemplars/{pack}/{row}": {"class_id": 5},
    "POST /v1/tokens": {"name": ""},
}
QUERIES = {
    "/v1/buffers/{buffer}/draw": "size=1",
    "/v1/buffers/{buffer}/exemplars": "class_id=0",
    "/v1/buffers/{buffer}/histogram": "of=class",
    "/v1/buffers/{buffer}/tasks/{task}/map": "method=none",
}

SCOPES = ("read", "write", "admin")
NOBODIES = ("nothing", "wrong", "expired", "revoked")
EVERYBODY = (*NOBODIES, *SCOPES, "own prefix", "other prefix", "environment")


@dataclass(frozen=True)
class Line:
    """A row of the tables above."""

    method: str
    path: str
    scope: str
    everything: bool
    status: int

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    def is_open_to(self, who: str) -> bool:
        """Whether this token's scope and prefix suffice, the buffer aside."""
        if self.scope == "open":
            return True
        if who in NOBODIES:
            return False
        if "prefix" in who:
            return not self.everything
        return who == "environment" or SCOPES.index(who) >= SCOPES.index(self.scope)

    def expected(self, who: str) -> int:
        """What the API answers to a bearer token."""
        if self.scope == "open":
            return self.status
        if who in NOBODIES:
            return 401
        if not self.is_open_to(who):
            return 403
        if who == "other prefix":
            if "{buffer}" in self.path or self.name == "POST /v1/buffers":
                return 403
            if "{ingest_id}" in self.path or self.path.startswith("/v1/packs/"):
                return 404
        return self.status


def lines(table: str) -> list[Line]:
    found = []
    for row in table.strip().splitlines():
        method, path, scope, *everything, status = row.split()
        found.append(Line(method, path, scope, bool(everything), int(status)))
    return found


@dataclass
class Place:
    """A service, the tokens of everybody, and what requests name."""

    service: ServiceThread
    tokens: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, httpx.Client] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def address(self, line: Line) -> str:
        path = re.sub(r"{(\w+)(:path)?}", lambda match: self.names[match[1]], line.path)
        query = QUERIES.get(line.path)
        return path + (f"?{query}" if query else "")


@pytest.fixture(scope="module")
def place(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = shutil.copytree(migrated, tmp_path_factory.mktemp("authorisation") / "data")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as closing:
        # The matrix tries more wrong tokens than anybody may.
        patch.setattr(tokens, "WRONG_BURST", 1e9)
        patch.setattr(sessions, "BEGUN_BURST", 1e9)
        service = ServiceThread(Settings(data_dir=folder, admin_token=ADMIN_TOKEN, workers=0))
        closing.callback(service.stop)
        create(service.state.database, "lab-1")
        fill(service.state.database, service.settings, 0, {0: 4}, name="lab-1")
        made = Place(service)
        with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}) as client:
            _hand_out(made, client, closing)
            made.names = {
                "buffer": "lab-1",
                "task": "0",
                "pack": client.get("/v1/buffers/lab-1/manifest").json()["packs"][0]["digest"],
                "row": "0",
                "ingest_id": client.get("/v1/ingests").json()["ingests"][0]["id"],
                "token_id": "none",
                "number": "0",
                "file": "favicon.png",
                "rest": "console.css",
            }
        made.names["sha256"] = made.names["pack"]
        yield made


def _hand_out(place: Place, client: httpx.Client, closing: ExitStack) -> None:
    """Everybody has a token and a session, also those whose token is not good any more."""
    service = place.service
    place.tokens = {"environment": ADMIN_TOKEN, "wrong": tokens.make_secret()}
    place.sessions = {"environment": _logged_in(service, ADMIN_TOKEN, closing)}
    prefixes = {"own prefix": "lab-", "other prefix": "field-"}
    for who in EVERYBODY:
        if who in ("nothing", "wrong", "environment"):
            continue
        wanted = {"name": f"test {who}", "scope": who if who in SCOPES else "admin", "prefix": prefixes.get(who, "")}
        made = client.post("/v1/tokens", json=wanted).json()
        place.tokens[who] = made["token"]
        place.sessions[who] = _logged_in(service, made["token"], closing)
        if who == "revoked":
            client.delete(f"/v1/tokens/{made['id']}")
        if who == "expired":
            with service.state.database.session() as session:
                session.execute(update(TokenRow).where(TokenRow.id == made["id"]).values(expires_at=1.0))
            service.state.tokens.forget()


def _logged_in(service: ServiceThread, token: str, closing: ExitStack) -> httpx.Client:
    client = closing.enter_context(httpx.Client(base_url=service.url))
    begun = client.post("/console/login", data={"csrf": _csrf(client), "token": token})
    assert begun.status_code == 303, begun.text
    return client


def _csrf(client: httpx.Client) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', client.get("/console/login").text)
    assert found is not None
    return found[1]


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of everything that an application answers."""
    for route in routes:
        inside = getattr(route, "effective_candidates", None)
        if inside is not None:
            yield from routes_of(inside())
            continue
        path: str = route.path
        methods = getattr(route, "methods", None)
        if methods is None:
            yield "GET", f"{path}/{'{file}' if path == '/docs/files' else '{rest:path}'}"
        for method in methods or ():
            if method != "HEAD":
                yield method, path


def test_every_route_has_a_row_in_the_tables_of_this_test_and_in_that_of_access(place: Place) -> None:
    routes = set(routes_of(place.service.app.routes))
    assert len(routes) > 50
    written = lines(API) + lines(CONSOLE)
    assert {(line.method, line.path) for line in written} == routes
    access = Access()
    for line in written:
        row, buffer = access.find(line.method, place.address(line).partition("?")[0])
        assert row is not None, line
        assert (row.scope or "open") == line.scope, line
        assert row.everything == line.everything, line
        assert (buffer == "lab-1") == ("{buffer}" in line.path), line


def test_the_table_of_access_names_routes_that_exist_and_each_once(place: Place) -> None:
    routes = set(routes_of(place.service.app.routes))
    named = [(row.method, row.path) for row in TABLE]
    assert len(named) == len(set(named))
    assert {row for row in named if "{rest:path}" not in row[1]} <= routes


@pytest.mark.parametrize("who", EVERYBODY)
def test_the_api_answers_everybody_as_the_table_says(place: Place, who: str) -> None:
    headers = {"If-Match": '"999"'} | ({"Authorization": f"Bearer {place.tokens[who]}"} if who in place.tokens else {})
    with httpx.Client(base_url=place.service.url, headers=headers) as client:
        wrong = {}
        for line in lines(API):
            answer = client.request(line.method, place.address(line), json=BODIES.get(line.name))
            if answer.status_code != line.expected(who):
                wrong[line.name] = f"{answer.status_code} for {line.expected(who)}: {answer.text[:200]}"
    assert wrong == {}


def test_a_session_is_nothing_to_the_api(place: Place) -> None:
    cookie = f"{COOKIE}={place.sessions['environment'].cookies[COOKIE]}"
    wrong = {}
    with httpx.Client(base_url=place.service.url, headers={"Cookie": cookie}) as client:
        for line in lines(API):
            answer = client.request(line.method, place.address(line))
            if answer.status_code != line.expected("nothing"):
                wrong[line.name] = answer.status_code
    assert wrong == {}


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(who, marks=() if who in ("nothing", "read", "own prefix") else pytest.mark.slow)
        for who in EVERYBODY
    ],
)
def test_the_console_answers_everybody_as_the_table_says(place: Place, who: str) -> None:
    other = _csrf(place.sessions["environment" if who == "read" else "read"])
    wrong = {}
    with httpx.Client(base_url=place.service.url) as stranger:
        client = place.sessions.get(who, stranger)
        own = _csrf(client)
        for line in lines(CONSOLE):
            for csrf in (own, "", other) if line.method == "POST" else (None,):
                if line.path.endswith("/logout") and csrf == own and who not in NOBODIES:
                    continue  # the session is needed for what follows: see the tests of sessions
                data = None if csrf is None else {"csrf": csrf}
                answer = client.request(line.method, place.address(line), data=data)
                has_to_log_in = line.scope != "open" and who in NOBODIES
                if has_to_log_in:
                    expected = 303
                elif csrf in ("", other) or (
                    line.scope != "open" and who == "other prefix" and "{buffer}" in line.path
                ):
                    expected = 403
                elif who == "other prefix" and "{ingest_id}" in line.path:
                    expected = 404
                else:
                    expected = line.status if line.is_open_to(who) else 403
                is_to_login = "console/login" in answer.headers.get("Location", "")
                if answer.status_code != expected or is_to_login != has_to_log_in:
                    told = f"{answer.status_code} for {expected}: {answer.headers.get('Location')}"
                    wrong[line.name, csrf == own] = told
    assert wrong == {}


def test_a_bearer_token_is_nothing_to_the_console(place: Place) -> None:
    for line in lines(CONSOLE):
        if line.scope != "open":
            headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
            answer = httpx.request(line.method, place.service.url + place.address(line), headers=headers)
            assert answer.status_code == 303, line


def test_a_route_that_nobody_has_thought_about_is_closed_to_everybody(place: Place) -> None:
    place.service.app.get("/v1/new")(lambda: "secret")
    for who in ("nothing", "environment"):
        headers = {"Authorization": f"Bearer {place.tokens[who]}"} if who in place.tokens else {}
        answer = httpx.get(f"{place.service.url}/v1/new", headers=headers)
        assert (answer.status_code, "secret" in answer.text) == (401 if who == "nothing" else 403, False)


def test_a_word_where_others_have_a_parameter_is_no_table() -> None:
    for paths in (("/a/{b}", "/a/c"), ("/a/c", "/a/{b}")):
        with pytest.raises(ValueError, match="row"):
            Access([Row("GET", path, "read") for path in paths])

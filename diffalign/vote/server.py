"""The page that shows images and takes votes, as a Flask application."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Collection
from typing import Any

from flask import Blueprint, Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, NotFound, SecurityError
from werkzeug.serving import WSGIRequestHandler, get_interface_ip, make_server

from diffalign.data import images
from diffalign.data.write import encoded
from diffalign.errors import UserError
from diffalign.report import render
from diffalign.vote.ballot import AlreadyJudged, Ballot

EVERYWHERE = "0.0.0.0"
LARGEST_REQUEST = 64 * 1024  # bytes; a vote takes a hundred


def create_app(
    ballot: Ballot,
    *,
    token: str,
    hosts: Collection[str],
    stop: Callable[[], None],
    until_done: bool = False,
) -> Flask:
    """The application: a page, its images by number, and votes as JSON, all below ``/<token>/``.

    Other web pages can't reach it: they don't know the token, a name that was pointed at this address
    (DNS rebinding) is not among `hosts`, and answers may be neither framed nor read across origins.

    Args:
        token: secret part of every address.
        hosts: names and addresses by which the server may be called.
        stop: called once, after the answer to the request that ends voting has been sent.
        until_done: end with the last vote instead of on request.
    """
    app = Flask("diffalign.vote", static_folder=None)
    app.config.update(TRUSTED_HOSTS=list(hosts), MAX_CONTENT_LENGTH=LARGEST_REQUEST)
    page = Blueprint("page", "diffalign.vote", url_prefix=f"/{token}")
    pictures = list(dict.fromkeys(image for task in ballot.tasks for image in task.images))
    number_of = {image: number for number, image in enumerate(pictures)}

    def shown(number: int) -> dict[str, Any]:
        task = ballot.tasks[number]
        return {
            "number": number,
            "prompt": task.prompts[0],
            "images": [number_of[image] for image in task.images],
        }

    def state(status: int = 200) -> Response:
        coming = [shown(number) for number in ballot.coming]
        answer = jsonify(
            mode=ballot.mode,
            scale=ballot.scale,
            annotator=ballot.annotator,
            file=str(ballot.out),
            judged=ballot.judged,
            total=len(ballot.tasks),
            task=coming[0] if coming else None,
            following=coming[1] if len(coming) > 1 else None,
        )
        answer.status_code = status
        if until_done and not coming:
            answer.call_on_close(stop)
        return answer

    @page.get("/")
    def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        answer = Response(render("vote.html", nonce=nonce), mimetype="text/html")
        answer.headers["Content-Security-Policy"] = (
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return answer

    @page.get("/state")
    def current() -> Response:
        return state()

    @page.get("/image/<int:number>")
    def image(number: int) -> Response | tuple[str, int]:
        if number >= len(pictures):
            return "there is no such image", 404
        try:
            data, ending = encoded(images.load(str(pictures[number]), pictures[number].parent))
        except (images.BadImage, OSError):
            return "this image can't be read any more", 404
        answer = Response(data, mimetype="image/jpeg" if ending == "jpg" else f"image/{ending}")
        answer.cache_control.private, answer.cache_control.max_age = True, 3600
        return answer

    @page.post("/vote")
    def vote() -> Response | tuple[str, int]:
        given = request.get_json()
        if not isinstance(given, dict) or "number" not in given or "verdict" not in given:
            return "a vote has a number and a verdict", 400
        try:
            ballot.cast(given["number"], given["verdict"])
        except ValueError as error:
            return str(error), 400
        except AlreadyJudged:
            return state(409)
        return state()

    @page.post("/undo")
    def undo() -> Response:
        request.get_json()
        ballot.undo()
        return state()

    @page.post("/finish")
    def finish() -> Response:
        request.get_json()
        answer = state()
        answer.call_on_close(stop)
        return answer

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[str, int]:
        lost = isinstance(error, NotFound | SecurityError)
        link = ": use the whole link that diffalign vote printed" if lost else ""
        return f"{error.name}{link}", error.code or 500

    @app.errorhandler(OSError)
    def not_written(error: OSError) -> tuple[str, int]:
        return f"The vote was not saved ({error.strerror or error}); make room and vote again.", 507

    @app.after_request
    def guarded(answer: Response) -> Response:
        answer.headers.setdefault("Cache-Control", "no-store")
        answer.headers.update(
            {
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cross-Origin-Opener-Policy": "same-origin",
            }
        )
        return answer

    app.register_blueprint(page)
    return app


class _Handler(WSGIRequestHandler):
    """One request a connection, so that none outlives the server; no line in the log for each."""

    protocol_version = "HTTP/1.0"

    def log_request(self, *args: Any) -> None:
        pass


def serve(ballot: Ballot, *, host: str, port: int, until_done: bool, announce: Callable[[str], None]) -> None:
    """Serve the page until voting ends or the user interrupts it.

    Args:
        ballot: what is judged.
        host: IPv4 address or name to listen on.
        port: 0 takes any free one.
        until_done: end with the last vote.
        announce: told the link to the page, once it can be opened.

    Raises:
        UserError: the address can't be listened on.
    """
    token = secrets.token_urlsafe(16)
    name = get_interface_ip(socket.AF_INET) if host == EVERYWHERE else host
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"can't listen on {host}, port {port} ({error.strerror}); "
            "choose another --port (0: any free one) or --host"
        ) from error
    with listening:
        port = listening.getsockname()[1]
        app = create_app(
            ballot,
            token=token,
            hosts=("127.0.0.1", "localhost", name),
            stop=lambda: server.shutdown(),
            until_done=until_done,
        )
        server = make_server(host, port, app, threaded=True, request_handler=_Handler, fd=listening.fileno())
    announce(f"http://{name}:{port}/{token}/")
    server.serve_forever()  # returns on Ctrl-C

"""The page that shows images and takes votes, as a Flask application."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from typing import Any

from flask import Blueprint, Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, NotFound, SecurityError

from diffalign.data import images
from diffalign.data.write import encoded
from diffalign.report import render
from diffalign.vote.ballot import AlreadyJudged, Ballot

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
        coming = [shown(number) for number in ballot.next]
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

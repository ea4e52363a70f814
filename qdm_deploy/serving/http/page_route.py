"""The page to try the model: three files of this package, nothing from elsewhere."""

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

__all__ = ["page_router"]

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/batch.js": ("batch.js", "text/javascript"),
}


def page_router() -> APIRouter:
    """Routes to the page's files, read once."""
    router = APIRouter(include_in_schema=False)
    folder = files("qdm_deploy.serving.http") / "page"
    for path, (name, media_type) in _FILES.items():
        _add(router, path, (folder / name).read_bytes(), media_type)

    @router.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    return router


def _add(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    @router.get(path)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

"""The Django app: its own ORM, templates and handlers, nothing in MIDDLEWARE but the variant's.

The handlers read MIDDLEWARE once, when they are made, so several variants can live in one
process; INSTALLED_APPS cannot differ between them and holds what any of them needs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from benchmarks import guarding, peers
from benchmarks.apps.fortunes import MESSAGES, PAGE

DATABASE = "file:benchmark?mode=memory&cache=shared"
MIDDLEWARE = dict.fromkeys(guarding.VARIANTS, guarding.DJANGO_MIDDLEWARE) | {
    "peers": peers.DJANGO_MIDDLEWARE
}
APPS = dict.fromkeys(guarding.VARIANTS, guarding.DJANGO_APPS) | {"peers": peers.DJANGO_APPS}
# The in-memory database lives while a connection to it is open.
_keep_alive: list[sqlite3.Connection] = []


def configure(framework: str, variants: Sequence[str]) -> None:
    """Set Django up for these variants, once per process."""
    import django
    from django.conf import settings

    if settings.configured:
        return
    kind = "async" if framework == "django-asgi" else "sync"
    settings.configure(
        DEBUG=False,
        SECRET_KEY="benchmark",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=f"benchmarks.apps.django_site.{kind}_urls",
        INSTALLED_APPS=["benchmarks.apps.django_site"]
        + [app for variant in variants for app in APPS.get(variant, ())],
        MIDDLEWARE=[],
        OPSGUARD=guarding.django_settings(variants),
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": DATABASE,
                "CONN_MAX_AGE": None,
            }
        },
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "OPTIONS": {
                    "loaders": [
                        (
                            "django.template.loaders.cached.Loader",
                            [
                                (
                                    "django.template.loaders.locmem.Loader",
                                    {"fortunes.html": PAGE},
                                )
                            ],
                        )
                    ]
                },
            }
        ],
    )
    _fill()
    django.setup()


def _fill() -> None:
    # Not through Django's connection: a server may import the app inside its event loop, where
    # Django refuses to touch a database.
    database = sqlite3.connect(DATABASE, uri=True, check_same_thread=False)
    database.execute(
        "CREATE TABLE django_site_fortune (id integer PRIMARY KEY, message text NOT NULL)"
    )
    database.executemany(
        "INSERT INTO django_site_fortune VALUES (?, ?)", list(enumerate(MESSAGES, 1))
    )
    database.commit()
    _keep_alive.append(database)


def handler(framework: str, variant: str) -> Any:
    """A new WSGI or ASGI handler with the variant's middleware."""
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler
    from django.test.utils import override_settings

    with override_settings(MIDDLEWARE=list(MIDDLEWARE.get(variant, ()))):
        return ASGIHandler() if framework == "django-asgi" else WSGIHandler()

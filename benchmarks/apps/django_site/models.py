"""The Fortunes table, to Django's ORM."""

from __future__ import annotations

from django.db import models


class Fortune(models.Model):
    """A row of the page."""

    message: models.TextField[str, str] = models.TextField()

    class Meta:
        app_label = "django_site"

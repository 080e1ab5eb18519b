"""The Fortunes page: twelve rows through an ORM, one added, sorted, escaped, rendered.

The task is that of the TechEmpower benchmarks, because it is what a small real page does. The
database is SQLite in memory: the cheapest there is, so that the framework's share, and with it
ours, looks as large as it can.
"""

from __future__ import annotations

from jinja2 import Environment
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

ADDED = "A row added while the request is served."
MESSAGES = (
    "The build is green until somebody runs it.",
    "Two clocks never agree; three start a committee.",
    "A cache is a bug report with a date on it.",
    "You will meet a tall, dark stack trace.",
    "Measure first; regret later, but with figures.",
    'The shortest path is "works on my machine".',
    "Nothing is as permanent as a temporary flag.",
    "Somewhere a retry loop is thinking of you.",
    "<script>alert('this must be escaped');</script>",
    "A good name is worth an afternoon & a half.",
    "Tomorrow's outage is today's TODO.",
    "フレームワークのベンチマーク",
)
PAGE = """<!DOCTYPE html>
<html><head><title>Fortunes</title></head><body><table>
<tr><th>id</th><th>message</th></tr>
{% for fortune in fortunes %}<tr><td>{{ fortune.id }}</td><td>{{ fortune.message }}</td></tr>
{% endfor %}</table></body></html>
"""


class Base(DeclarativeBase):
    """Declarative base of the page's one table."""


class Fortune(Base):
    """A row of the page."""

    __tablename__ = "fortune"

    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[str]


class Fortunes:
    """Database and template of one app. Every call of `page` is a whole page."""

    def __init__(self) -> None:
        self._engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        Base.metadata.create_all(self._engine)
        with Session(self._engine) as session:
            session.add_all(Fortune(id=n, message=text) for n, text in enumerate(MESSAGES, 1))
            session.commit()
        self._template = Environment(autoescape=True).from_string(PAGE)

    def page(self) -> str:
        with Session(self._engine) as session:
            fortunes = list(session.scalars(select(Fortune)))
            fortunes.append(Fortune(id=0, message=ADDED))
            fortunes.sort(key=lambda fortune: fortune.message)
            return self._template.render(fortunes=fortunes)

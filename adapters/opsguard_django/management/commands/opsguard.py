"""``manage.py opsguard limits show``: the commands of opsguard for this project."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from opsguard_django.project import project_ops
from opsguard_django.routes import project_routes

__all__ = ["Command"]


class Command(BaseCommand):
    help = "What is limited in this project, and why: limits show, limits explain PATH."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("words", nargs="*", metavar="WORD", help="limits show | explain PATH")

    def run_from_argv(self, argv: list[str]) -> None:
        """What stands behind the name goes to the command as it is, options included."""
        self.execute(words=argv[2:], no_color=False, force_color=False, skip_checks=True)

    def handle(self, *args: Any, **options: Any) -> None:
        words = [*args, *options.get("words", ())]
        if words[:1] != ["limits"]:
            raise CommandError("there is one command: limits show, or limits explain PATH")
        ops = project_ops()
        runtime = ops.runtime()
        if project_routes not in runtime.sources:
            runtime.sources.append(project_routes)
        try:
            ops.limiter.commands()(words[1:], prog_name="manage.py opsguard limits")
        except ModuleNotFoundError as error:
            lacking = f"{error.name} is not installed: the extra opsguard-toolkit[cli] has it"
            raise CommandError(lacking) from error

"""Memories inside other people's models. Each submodule imports its library only when it is used."""

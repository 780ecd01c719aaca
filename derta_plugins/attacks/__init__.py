"""Attacks that need nothing but the request, or its harmful answer. None of them brings harmful text of its own."""

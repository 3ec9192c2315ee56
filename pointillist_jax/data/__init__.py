"""Captures, synthetic people, rigged fits, the token store, and the streams that training reads (DESIGN §2, §6)."""

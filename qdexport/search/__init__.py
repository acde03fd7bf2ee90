"""Finds the forms of operators by building blocks of a network and comparing their kernel plans."""

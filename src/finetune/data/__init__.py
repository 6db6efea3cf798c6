"""Datasets: each is a function that returns Splits, labelled images read one by one."""

"""From a Keras model to a schedule: trace, costs, plan, lowering, schedule.

Functions from value to value. Nothing here knows of processes.
"""

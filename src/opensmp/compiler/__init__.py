"""The compiler, from a Keras model to a schedule: trace, costs, plan, lowering, schedule.

It consists of pure functions of values and does not depend on processes.
"""

"""The write path from end to end: plan, probe, one block after another, resume.

pipeline    `compress`: opens the source, makes the plan, goes through the stages, resumes
settings    what the user chooses
job         what every part of one compression works with
identity    what makes two runs the same run
plan        memory, disk and time, said before the run
estimate    the time
probe       bits as a function of the step, learned on a sample
rate        the step that meets a target in bits
unseen      the model's own words beside the calibration text
blocks      one block after another
layer       solves and encodes the experts of one module
dense       codes the matrices beside the experts
coding      integers -> bytes
carried     tensors that no module takes
report      what is said at the end
target      `--model-bits`: one target for the whole file
allocation  a budget of bits divided by one slope
apart       processes that share neither files nor mappings
"""

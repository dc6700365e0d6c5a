"""Files of BackdoorBench and backdoor-toolbox: read without running what is in them, and written for them to read."""

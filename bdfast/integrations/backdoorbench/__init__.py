"""BackdoorBench and backdoor-toolbox: their files, read without running what is in them, and written as they read them."""

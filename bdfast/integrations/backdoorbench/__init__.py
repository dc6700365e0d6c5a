"""BackdoorBench and backdoor-toolbox: their files, read without running what is in them, written as they read them."""

"""Where a message goes, and what each host must prove."""

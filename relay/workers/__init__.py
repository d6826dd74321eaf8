"""The processes of a relay: how they are started and watched, and how they are asked as one.

supervisor        `workers: N`: forks the workers and watches over them
worker            what a worker was given at its fork, and its line to the supervisor
worker_config     what a worker gets of the configuration
sockets           the listening sockets that a worker does not open itself
shared_counters, shared_settings, shared_limits, shared_rests
                  memory that all workers share
all_queues        the queues of all workers looked at as one
all_workers       all workers changed and asked as one, through `other_worker`
systemd           what the service manager is told, and the sockets it hands over
programlog        the program's own log, on stderr
"""

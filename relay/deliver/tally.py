"""Collects the results of an attempt, host by host, and gives the final outcomes. Pure.

A recipient is settled when its result is certain: delivered, refused permanently, or in doubt. The
others go on to the next host. If no host is left, each is deferred with the most informative
result: TLS that no host could give, else the last reply of any host, else the last silence. A
message that no host can take bounces, with the status of the last host.

With `on_tls_unmet: bounce` a message bounces at once if TLS was the only obstacle. So does a
message with REQUIRETLS, with any configuration (RFC 8689 §4.2.1). Any other trouble, also in the
DNS, or a host that was not tried because it failed before, makes the attempt temporary: at another
time there may be a host.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.deliver.diagnosis import NO_REQUIRETLS, NO_SECURE_WAY, for_good, for_now, host_line
from relay.deliver.sessions import SessionLog
from relay.mail.outcome import Bounced, Code, Deferred, Outcome, PolicyResult, PolicyType, Routing
from relay.mail.record import replace
from relay.queue.entry import QueuedRecipient
from relay.route.next_hop import Host


class Tally:
    """The recipients of one attempt. `trouble`, `rejected`: what routing met on the way, one line
    each. `routing`: what every outcome tells of it. `sessions`: those that reports on TLS count.
    """

    def __init__(
        self,
        recipients: Iterable[QueuedRecipient],
        *,
        bounce_unmet: bool = False,
        requiretls: bool = False,
        trouble: tuple[str, ...] = (),
        rejected: tuple[str, ...] = (),
        routing: Routing | None = None,
        sessions: SessionLog | None = None,
    ) -> None:
        self._pending = {recipient.index: recipient for recipient in recipients}
        self._order = tuple(self._pending)
        self._settled: dict[int, Outcome] = {}
        self._said: dict[int, list[tuple[Host, Deferred | Bounced]]] = {}
        """What hosts said of each recipient that was not settled with it."""
        self.sessions = SessionLog() if sessions is None else sessions
        self._bounce_unmet = bounce_unmet
        self._requiretls = requiretls
        self._trouble = bool(trouble)
        self._temporary = self._trouble
        self._lines = trouble + rejected
        self.routing = routing

    @property
    def pending(self) -> tuple[QueuedRecipient, ...]:
        """The recipients that are not settled."""
        return tuple(self._pending.values())

    @property
    def is_settled(self) -> bool:
        """Whether all recipients are settled."""
        return not self._pending

    def is_pending(self, recipient: QueuedRecipient) -> bool:
        """Whether the recipient is not settled."""
        return recipient.index in self._pending

    def settle(self, host: Host, index: int, outcome: Outcome) -> None:
        """The recipient is settled with this outcome; no other host is tried for it."""
        del self._pending[index]
        self._settled[index] = self._with_hosts(outcome, index, but=host)

    def go_on(self, host: Host, index: int, outcome: Deferred | Bounced) -> None:
        """Note the result of a host for a recipient; another host may have a better one."""
        self._said.setdefault(index, []).append((host, outcome))
        if isinstance(outcome, Bounced):
            return
        if not outcome.tls_unmet or _insists_on_tls(outcome) or _is_dns_failure(outcome):
            self._temporary = True

    def go_on_for(
        self, recipients: Iterable[QueuedRecipient], host: Host, outcome: Deferred | Bounced
    ) -> None:
        """The same for several recipients."""
        for recipient in recipients:
            self.go_on(host, recipient.index, outcome)

    def pass_by(self, host: Host, outcome: Deferred) -> None:
        """A host is not tried, since it failed a moment ago with this outcome."""
        for index in self._pending:
            self._said.setdefault(index, []).append((host, outcome))
        self._temporary = True

    @property
    def is_unmet_by_policy(self) -> bool:
        """Whether a host was given up because of the recipient domain's MTA-STS policy."""
        unmet = (outcome for index in self._pending for _, outcome in self._said.get(index, ()))
        return any(_failed_the_policy(outcome) for outcome in unmet)

    def begin_anew(self) -> None:
        """Forget the results of hosts for pending recipients: all hosts are tried again."""
        for index in self._pending:
            self._said.pop(index, None)
        self._temporary = self._trouble

    def outcomes(self) -> dict[int, Outcome]:
        """The final outcome of every recipient."""
        return {index: self._settled.get(index) or self._last(index) for index in self._order}

    def _last(self, index: int) -> Outcome:
        host, outcome = max(
            enumerate(self._said[index]),
            key=lambda numbered: (_weight(numbered[1][1]), numbered[0]),
        )[1]
        return self._with_hosts(self._final(outcome), index, but=host)

    def _final(self, outcome: Deferred | Bounced) -> Outcome:
        """The most informative result, as the outcome of the attempt."""
        if isinstance(outcome, Bounced):
            return for_now(outcome) if self._trouble else outcome
        # A next hop that requires TLS makes no message bounce; a host without the keyword does.
        bounces = self._bounce_unmet or outcome.status == NO_REQUIRETLS
        if outcome.tls_unmet and bounces and not self._temporary:
            lacks_more = self._requiretls and outcome.status != NO_REQUIRETLS
            return for_good(outcome, NO_SECURE_WAY if lacks_more else "")
        return outcome

    def _with_hosts(self, outcome: Outcome, index: int, *, but: Host) -> Outcome:
        """The outcome with what routing and the other hosts have to say about a recipient."""
        said_of = self._said.get(index, ())
        tried = [(host, said) for host, said in said_of if host != but] if said_of else []
        if not tried:
            if outcome.routing is self.routing and not self._lines:
                return outcome
            return replace(outcome, hosts=self._lines, routing=self.routing)
        return replace(
            outcome,
            hosts=(*self._lines, *(host_line(host, said) for host, said in tried)),
            earlier=tuple(said.session for _, said in tried if said.session is not None),
            routing=self.routing,
        )


def _insists_on_tls(outcome: Deferred) -> bool:
    """Whether a host demanded TLS with a refusal in clear (RFC 3207 §4), which makes no bounce.

    It is the only 4.7.5 with a reply; a refused STARTTLS is 4.7.4.
    """
    return outcome.status == "4.7.5" and outcome.code >= 500


def _is_dns_failure(outcome: Deferred) -> bool:
    """Whether a host was given up because its TLSA records are unknown, which is temporary."""
    return outcome.policy is not None and outcome.policy.result is PolicyResult.DNSSEC_INVALID


def _failed_the_policy(outcome: Deferred | Bounced) -> bool:
    policy = outcome.session.policy if outcome.session is not None else outcome.policy
    if policy is None or policy.type is not PolicyType.STS or policy.result is None:
        return False
    if outcome.session is None and policy.mode is None:
        return False  # a pin kept the host out, and the policy could not be fetched
    return isinstance(outcome, Deferred) and outcome.tls_unmet


def _weight(outcome: Deferred | Bounced) -> int:
    """How informative an outcome is. A temporary one counts more than "this host cannot"."""
    if isinstance(outcome, Bounced):
        return -1
    if outcome.tls_unmet:
        return 3 if outcome.status == NO_REQUIRETLS else 2
    return 0 if outcome.code in (Code.NONE, Code.NO_CONNECTION) else 1

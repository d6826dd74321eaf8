# Net::SMTP, the core of most old Perl scripts: host, port, ca, sender, recipient, user, password, tls (none, starttls, ssl).
use strict;
use warnings;
use Net::SMTP;

my ( $host, $port, $ca, $sender, $recipient, $user, $password, $tls ) = @ARGV;
my %ssl = ( SSL_ca_file => $ca, SSL_verify_mode => 1 );
my $smtp = Net::SMTP->new( $host, Port => $port, Timeout => 20, Hello => 'perl.example', $tls eq 'ssl' ? ( SSL => 1, %ssl ) : () )
  or die "no connection: $@";
$tls ne 'starttls' or $smtp->starttls(%ssl) or die 'no TLS: ' . $smtp->message;
$user eq '' or $smtp->auth( $user, $password ) or die 'no AUTH: ' . $smtp->message;
binmode STDIN;
my $content = do { local $/; <STDIN> };
$smtp->mail($sender)   or die $smtp->message;
$smtp->to($recipient)  or die $smtp->message;
$smtp->data($content)  or die $smtp->message;
$smtp->quit;

# Tries the network from inside a guest with nothing but Debian's perl-base:
# each line of input is one try, each line of output what came of it.
use strict; use warnings; use Socket; use Errno; $| = 1;
my ($index) = map { chomp; $_ } do { open my $f, '<', '/sys/class/net/eth0/ifindex' or die; <$f> };
my $mac = pack 'H12', join '', split /:/, do { open my $f, '<', '/sys/class/net/eth0/address' or die; <$f> };
my $gate = pack 'H12', '026268000001';
my $me = do { socket(my $s, PF_INET, SOCK_DGRAM, 17); connect $s, pack_sockaddr_in(9, inet_aton '192.0.2.77'); (unpack_sockaddr_in(getsockname $s))[1] };
my @held;

sub said { # the error by name
    my ($e) = @_;
    return 'refused' if $e == Errno::ECONNREFUSED;
    return 'prohibited' if $e == Errno::EHOSTUNREACH || $e == Errno::EACCES;
    return 'no route' if $e == Errno::ENETUNREACH || $e == Errno::EADDRNOTAVAIL;
    return "error $e";
}
sub ready { my ($s, $write, $time) = @_; my $v = ''; vec($v, fileno $s, 1) = 1;
    return $write ? select(undef, my $w = $v, undef, $time) : select(my $r = $v, undef, undef, $time); }
sub address { my ($host, $port) = @_;
    return $host =~ /:/ ? (PF_INET6, pack_sockaddr_in6($port, Socket::inet_pton(AF_INET6, $host)))
                        : (PF_INET, pack_sockaddr_in($port, inet_aton $host)); }
sub tcp { my ($host, $port, $hold) = @_;
    my ($family, $to) = address($host, $port);
    socket(my $s, $family, SOCK_STREAM, 6) or return said($!);
    if (!fcntl_nonblock($s) || !connect($s, $to)) {
        return said($!) unless $! == Errno::EINPROGRESS;
        return 'silence' unless ready($s, 1, 3);
        my $e = unpack 'i', getsockopt($s, SOL_SOCKET, SO_ERROR);
        return said($e) if $e;
    }
    push @held, $s if $hold;
    return 'open' if $hold;
    return 'silent' unless ready($s, 0, 3);
    sysread $s, my $line, 100; chomp $line; return "open $line"; }
sub fcntl_nonblock { my ($s) = @_; my $f = fcntl($s, 3, 0); return fcntl($s, 4, $f | 2048); }
sub udp { my ($host, $port) = @_;
    my ($family, $to) = address($host, $port);
    socket(my $s, $family, SOCK_DGRAM, 17) or return said($!);
    setsockopt $s, SOL_SOCKET, SO_BROADCAST, 1;
    connect $s, $to or return said($!);
    defined send $s, "hello\n", 0 or return said($!);
    return 'silence' unless ready($s, 0, 2);
    my $got = recv $s, my $line, 100, 0; return said($!) unless defined $got;
    chomp $line; return "open $line"; }
sub sum { my ($data) = @_; my $sum = 0; $sum += $_ for unpack 'n*', $data . (length($data) % 2 ? "\0" : '');
    $sum = ($sum >> 16) + ($sum & 0xffff) while $sum >> 16; return ~$sum & 0xffff; }
sub ping { my ($host) = @_;
    socket(my $s, PF_INET, SOCK_RAW, 1) or return said($!);
    my $echo = pack 'CCnnn', 8, 0, 0, 7, 1; substr($echo, 2, 2) = pack 'n', sum($echo);
    defined send $s, $echo, 0, pack_sockaddr_in(0, inet_aton $host) or return said($!);
    my $end = time + 2;
    while (time <= $end && ready($s, 0, 1)) {
        recv $s, my $answer, 200, 0; my ($type, $code) = unpack 'CC', substr $answer, 20;
        return 'reply' if $type == 0; return 'prohibited' if $type == 3 && $code == 13; }
    return 'silence'; }
sub ip { my ($from, $to, $proto, $data) = @_;
    my $h = pack 'CCnnnCCna4a4', 0x45, 0, 20 + length $data, 1, 0, 64, $proto, 0, $from, $to;
    substr($h, 10, 2) = pack 'n', sum($h); return $h . $data; }
my $udp = pack 'nnnn', 4000, 80, 8, 0;
my $web = inet_aton('203.0.113.1');
my $six = pack 'H32', 'fe800000000000000062' . '68fffe000002';
my $all = pack 'H32', 'ff020000000000000000000000000001';
sub icmp6 { my ($from, $body) = @_;
    my $c = sum($from . $all . pack('NN', length $body, 58) . $body); substr($body, 2, 2) = pack 'n', $c;
    return pack('Nn CC', 6 << 28, length $body, 58, 255) . $from . $all . $body; }
my %frames = (
    mac => sub { $gate . pack('H12', '020000000099') . pack('n', 0x800) . ip($me, $web, 17, $udp) },
    source => sub { $gate . $mac . pack('n', 0x800) . ip(inet_aton('198.18.0.1'), $web, 17, $udp) },
    elsewhere => sub { $gate . $mac . pack('n', 0x800) . ip(inet_aton('8.8.8.8'), $web, 17, $udp) },
    arp => sub { "\xff" x 6 . $mac . pack('n nnCCn a6a4a6a4', 0x806, 1, 0x800, 6, 4, 2, $mac, inet_aton('198.18.0.1'), "\0" x 6, $me) },
    'arp-mac' => sub { "\xff" x 6 . $mac . pack('n nnCCn a6a4a6a4', 0x806, 1, 0x800, 6, 4, 2, "\x02\0\0\0\0\x99", $me, "\0" x 6, $me) },
    vlan => sub { $gate . $mac . pack('nnn', 0x8100, 5, 0x800) . ip($me, $web, 17, $udp) },
    qinq => sub { $gate . $mac . pack('nnnnn', 0x88a8, 5, 0x8100, 6, 0x800) . ip($me, $web, 17, $udp) },
    stp => sub { pack('H12', '0180c2000000') . $mac . pack('n', 38) . "\x42\x42\x03" . "\0" x 35 },
    multicast => sub { pack('H12', '01005e0000fb') . $mac . pack('n', 0x800) . ip($me, inet_aton('224.0.0.251'), 17, $udp) },
    'dhcp-offer' => sub { "\xff" x 6 . $mac . pack('n', 0x800) . ip($me, inet_aton('255.255.255.255'), 17, pack('nnnn', 67, 68, 8, 0)) },
    'dhcp-unicast' => sub { $gate . $mac . pack('n', 0x800) . ip($me, inet_aton('203.0.113.9'), 17, pack('nnnn', 67, 68, 8, 0)) },
    ra => sub { pack('H12', '333300000001') . $mac . pack('n', 0x86dd) . icmp6($six, pack('CCnCCnNN', 134, 0, 0, 64, 0, 1800, 0, 0)) },
    ipv6 => sub { $gate . $mac . pack('n', 0x86dd) . icmp6($six, pack('CCnnn', 128, 0, 0, 1, 1)) },
);
sub frame { my ($name) = @_;
    socket(my $s, 17, SOCK_RAW, 0) or return said($!);
    my $to = pack 'SnlSCCa8', 17, 3, $index, 0, 0, 6, "\0" x 8;
    my $frame = $frames{$name}->(); $frame .= "\0" x (60 - length $frame) if length $frame < 60;
    return defined send($s, $frame, 0, $to) ? 'sent' : said($!); }
sub raw { my ($frames) = @_; # frames in hexadecimal digits
    socket(my $s, 17, SOCK_RAW, 0) or return said($!);
    my $to = pack 'SnlSCCa8', 17, 3, $index, 0, 0, 6, "\0" x 8;
    for (split /,/, $frames) { defined send $s, pack('H*', $_), 0, $to or return said($!) }
    return 'sent'; }
# SYNs of no socket of the guest's kernel, which resets what answers them.
sub whole { my ($to, $id, $field, $data, $options) = @_; my $words = 5 + length($options) / 4;
    return pack('CCnnnCCna4a4', 0x40 | $words, 0, 4 * $words + length $data, $id, $field, 64, 6, 0, $me, $to) . $options . $data; }
sub syn { my ($to, $from, $port, $options) = @_; my $words = 5 + length($options) / 4;
    my $t = pack('nnNNCCnnn', $from, $port, 7, 0, $words << 4, 2, 64000, 0, 0) . $options;
    substr($t, 16, 2) = pack 'n', sum(pack('a4a4CCn', $me, $to, 0, 6, length $t) . $t); return $t; }
my $odd = 40000;
sub odd { my ($host, $port, $make) = @_; # what answers the packets that $make gives
    my ($to, $from, $end) = (inet_aton($host), $odd++, time + 3);
    socket(my $out, PF_INET, SOCK_RAW, 255) or return said($!);
    socket(my $in, PF_INET, SOCK_RAW, 6) or return said($!);
    for my $packet ($make->($to, $from)) { defined send $out, $packet, 0, pack_sockaddr_in(0, $to) or return said($!) }
    while (time < $end && ready($in, 0, 1)) {
        recv $in, my $got, 200, 0; my $head = 4 * (15 & ord $got);
        my ($there, $here, $flags) = unpack 'nnx9C', substr $got, $head;
        next unless substr($got, 12, 4) eq $to && $there == $port && $here == $from;
        return $flags & 4 ? 'refused' : 'open'; }
    return 'silence'; }
sub pieces { my ($host, $port) = @_; return odd($host, $port, sub { my ($to, $from) = @_; my $t = syn($to, $from, $port, "\1" x 20);
    return (whole($to, $from, 0x2000, substr($t, 0, 8), ''), whole($to, $from, 1, substr($t, 8), '')); }); }
sub overlap { my ($host, $port, $other) = @_; return odd($host, $other, sub { my ($to, $from) = @_;
    my ($a, $b) = map { syn($to, $from, $_, "\1" x 20) } $port, $other;
    return (whole($to, $from, 0x2000, substr($a, 0, 8), ''), whole($to, $from, 0x2000, substr($b, 0, 16), ''), whole($to, $from, 2, substr($b, 16), '')); }); }
sub options { my ($host, $port) = @_; return odd($host, $port, sub { my ($to, $from) = @_;
    return whole($to, $from, 0, syn($to, $from, $port, "\x02\x04\0\1\xfd\x04\xde\xad\x22\x02\1\1"), ''); }); }
sub detour { my ($host, $port, $over) = @_; return odd($host, $port, sub { my ($to, $from) = @_;
    return whole($to, $from, 0, syn($to, $from, $port, ''), pack('CCCa4C', 131, 7, 4, inet_aton($over), 1)); }); }
sub flood { my ($host, $port, $count) = @_; my ($to, $sent) = (inet_aton($host), 0);
    socket(my $out, PF_INET, SOCK_RAW, 255) or return said($!);
    for my $n (1 .. $count) { $sent++ if defined send $out, whole($to, $n & 0xffff, 0, syn($to, 1024 + $n % 60000, $port, ''), ''), 0, pack_sockaddr_in(0, $to) }
    return "$sent sent"; }
sub sniff { my ($seconds) = @_; # frames of others, while own ones are seen
    socket(my $s, 17, SOCK_RAW, unpack 'S', pack 'n', 3) or return said($!);
    setsockopt $s, 263, 1, pack 'iSSa8', $index, 1, 0, '' or return said($!);
    my ($own, $others, $end) = (0, 0, time + $seconds); ping('198.18.0.1');
    while (time < $end) { next unless ready($s, 0, 1); recv $s, my $frame, 200, 0;
        next unless unpack('x12n', $frame) == 0x800;
        (grep { $_ eq $me } unpack 'x26a4a4', $frame) ? $own++ : $others++ }
    return $others ? "$others of others" : $own ? 'own only' : 'deaf'; }
sub scan { my ($host, $first, $last) = @_;
    my @open = grep { tcp($host, $_, 0) =~ /^open/ } $first .. $last; return "@open"; }
sub get { my ($host, $port) = @_; # bytes until the end
    my ($family, $to) = address($host, $port);
    socket(my $s, $family, SOCK_STREAM, 6) or return said($!);
    connect $s, $to or return said($!);
    my $all = 0; my $n; my $end = time + 20;
    while (time < $end && ready($s, 0, 5)) { $n = sysread $s, my $x, 65536; last unless $n; $all += $n }
    return "$all bytes" . (defined $n && $n == 0 ? '' : ' and no end'); }
sub put { my ($host, $port, $bytes) = @_;
    my ($family, $to) = address($host, $port);
    socket(my $s, $family, SOCK_STREAM, 6) or return said($!);
    connect $s, $to or return said($!);
    my $left = $bytes; while ($left > 0) { my $n = syswrite $s, 'x' x ($left > 16384 ? 16384 : $left) or last; $left -= $n }
    shutdown $s, 1; my ($line, $x) = ('', ''); $line .= $x while sysread $s, $x, 100; chomp $line; return length $line ? $line : 'cut'; }
sub name { my ($host) = @_; # its addresses, or why there are none
    my @all = gethostbyname $host; my $e = $? >> 0;
    return 'unknown' if !@all && $e == 1; return 'try again' if !@all && $e == 2;
    return 'no address' if !@all; return join ' ', sort map { inet_ntoa $_ } @all[4 .. $#all]; }
sub name6 { my ($host) = @_; my ($e, @all) = Socket::getaddrinfo($host, 80, { family => AF_INET6, socktype => SOCK_STREAM });
    return $e ? 'none' : Socket::inet_ntop(AF_INET6, (unpack_sockaddr_in6($all[0]{addr}))[1]); }
sub packed { my ($text) = @_; return $text =~ /:/ ? Socket::inet_pton(AF_INET6, $text) : inet_aton $text; }
sub asked { my ($address, $port, $request) = @_; # all of the answer, or why there is none
    my ($family, $to) = length $address == 16 ? (PF_INET6, pack_sockaddr_in6($port, $address)) : (PF_INET, pack_sockaddr_in($port, $address));
    socket(my $s, $family, SOCK_STREAM, 6) or return said($!);
    connect $s, $to or return said($!);
    syswrite $s, $request;
    my ($all, $x) = ('', ''); while (ready($s, 0, 10) && sysread $s, $x, 65536) { $all .= $x }
    return $all; }
sub web { my ($host, $port, $asked, $at) = @_; # the status of a request, and a refusal's code
    my $address = defined $at ? packed($at) : gethostbyname $host; return 'no address' unless $address;
    my $all = asked($address, $port, "GET / HTTP/1.1\r\nHost: $asked\r\nConnection: close\r\n\r\n");
    my ($status) = $all =~ m{^HTTP/1.1 (\d+)} or return $all || 'no answer';
    my ($code) = $all =~ /"code":\s*"([a-z-]+)"/; my ($server) = $all =~ /^I am (\S+)/m;
    return join ' ', $status, grep { defined } $code, $server; }
sub follow { my ($host, $port) = @_; # where a redirection leads
    my $all = asked(scalar gethostbyname($host), $port, "GET / HTTP/1.1\r\nHost: $host\r\nConnection: close\r\n\r\n");
    my ($next) = $all =~ m{^Location: http://([0-9.]+)/}m or return 'nowhere'; return tcp($next, 80, 0); }
sub relay { my ($host, $port, $to) = @_; # a tunnel to somebody else
    my $all = asked(scalar gethostbyname($host), $port, "CONNECT $to HTTP/1.1\r\nHost: $to\r\n\r\n");
    my ($status) = $all =~ m{^HTTP/1.1 (\d+)} or return 'no answer'; my ($code) = $all =~ /"code":\s*"([a-z-]+)"/;
    return join ' ', $status, grep { defined } $code; }
sub tls { my ($host, $name, $ech) = @_; # what comes of a handshake that asks this host for a name, or for none (-)
    my $address = $host =~ /^[0-9.]+$|:/ ? packed($host) : gethostbyname $host; return 'no address' unless $address;
    my $more = $name eq '-' ? '' : pack('n', 0) . pack('n/a*', pack('n/a*', "\0" . pack('n/a*', $name)));
    $more .= pack('n n/a*', 0xfe0d, 'x' x 20) if $ech;
    my $body = "\3\3" . "\7" x 32 . "\0" . pack('n/a*', "\x13\1") . "\1\0" . pack('n/a*', $more);
    my $all = asked($address, 443, pack('Cnn/a*', 22, 0x301, "\1" . substr(pack('N', length $body), 1) . $body));
    return 'alert ' . unpack('x6C', $all) if $all =~ /^\x15/;
    return $all =~ /^I am (\S+)/m ? "reached $1" : $all || 'no answer'; }
sub tunnel { my ($domain, $count) = @_; # characters that names carry out before they are refused
    my ($out, @letters) = (0, 'a' .. 'z', 2 .. 7);
    for (1 .. $count) { my $data = join '', map { $letters[rand @letters] } 1 .. 40;
        my @all = gethostbyname "$data.$domain"; $out += 40 unless !@all && $? == 2 }
    return $out < $count * 20 ? 'held' : "$out characters"; }
my %tries = (raw => \&raw, tls => \&tls, tunnel => \&tunnel, name => \&name, name6 => \&name6, web => \&web, tcp => \&tcp, udp => \&udp, ping => \&ping, frame => \&frame, scan => \&scan, get => \&get, pieces => \&pieces, overlap => \&overlap, options => \&options, detour => \&detour, flood => \&flood, sniff => \&sniff,
    follow => \&follow, relay => \&relay, put => \&put,
    hold => sub { my ($h, $p, $n) = @_; my %r; $r{tcp($h, $p, 1)}++ for 1 .. $n; join ', ', map { "$r{$_} $_" } sort keys %r });
while (<STDIN>) { chomp; my ($kind, @rest) = split; print $tries{$kind}->(@rest), "\n" }

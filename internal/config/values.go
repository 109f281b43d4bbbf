package config

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"kerberos/proxy"
	"kerberos/registry"
)

// Off is the --admin that opens no admin listener, and the --access-log that writes none.
const Off = "off"

// GRPC is the --otlp-protocol beside http.
const GRPC = "grpc"

// API says which listeners serve the API.
type API string

const (
	APIData  API = "data"
	APIAdmin API = "admin"
	APIBoth  API = "both"
)

func (a API) OnData() bool  { return a != APIAdmin }
func (a API) OnAdmin() bool { return a != APIData }

// Allow says who may use the API while no token is set. The zero Allow was not given and means loopback.
type Allow struct {
	Networks []netip.Prefix
	None     bool // nobody
	Set      bool // given, even if it repeats the default
}

// Decode adds one --api-allow: networks and the word loopback, separated by commas, or none.
func (a *Allow) Decode(ctx *kong.DecodeContext) error {
	var s string
	if err := ctx.Scan.PopValueInto("value", &s); err != nil {
		return err
	}
	for word := range strings.SplitSeq(s, ",") {
		switch word = strings.TrimSpace(word); word {
		case "none":
			a.None = true
		case "loopback":
			a.Networks = append(a.Networks, netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128"))
		default:
			network, err := parseNetwork(word)
			if err != nil {
				return fmt.Errorf("%w, loopback or none", err)
			}
			a.Networks = append(a.Networks, network)
		}
	}
	if a.None && len(a.Networks) > 0 {
		return fmt.Errorf("%q: none stands alone", s)
	}
	a.Set = true
	return nil
}

// String is as --api-allow has it.
func (a Allow) String() string {
	if a.None {
		return "none"
	}
	if !a.Set {
		return ""
	}
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(a.Networks), " ", ","), "[]")
}

// Switch is a flag that is on or off.
type Switch bool

func (s Switch) String() string {
	if s {
		return "on"
	}
	return "off"
}

// IsBool lets the flag stand without a value.
func (*Switch) IsBool() bool { return true }

// Decode reads --x, --no-x and --x=off. What follows without a = is another argument, and a mistake if it says on or off.
func (s *Switch) Decode(ctx *kong.DecodeContext) error {
	next := ctx.Scan.Peek()
	word := fmt.Sprint(next.Value)
	on, known := onOrOff(word)
	switch {
	case next.Type == kong.FlagValueToken && !known:
		return fmt.Errorf("%q is neither on nor off", word)
	case next.Type == kong.FlagValueToken:
		ctx.Scan.Pop()
		*s = Switch(on)
	case known:
		return fmt.Errorf("its value needs a =: --%s=%s", ctx.Value.Name, word)
	default:
		*s = true
	}
	return nil
}

func onOrOff(word string) (on, known bool) {
	switch strings.ToLower(word) {
	case "on", "true", "yes", "1":
		return true, true
	case "off", "false", "no", "0":
		return false, true
	}
	return false, false
}

// Share is a number, or a part of one that is known only where the gateway runs.
type Share struct{ Number, Percent int }

// Of returns the number, or the part of whole that it is. 0 is no limit, and so is a part of what is not known (0).
func (s Share) Of(whole uint64) int {
	if s.Percent == 0 || whole == 0 {
		return s.Number
	}
	const most = 1 << 30 // what a limit may be
	return max(1, int(min(whole, most)*uint64(s.Percent)/100))
}

// String is the number, or the percentage.
func (s Share) String() string {
	if s.Percent > 0 {
		return strconv.Itoa(s.Percent) + "%"
	}
	return strconv.Itoa(s.Number)
}

func parseShare(s string) (Share, error) {
	digits, percent := strings.CutSuffix(s, "%")
	n, err := strconv.ParseUint(digits, 10, 30)
	if err != nil || percent && (n < 1 || n > 100) {
		return Share{}, fmt.Errorf("%q is neither a whole number from 0 to %d nor a percentage from 1%% to 100%%", s, 1<<30-1)
	}
	if percent {
		return Share{Percent: int(n)}, nil
	}
	return Share{Number: int(n)}, nil
}

// Portion is a part of all requests, from 0 to 1.
type Portion float64

func parsePortion(s string) (Portion, error) {
	digits, percent := strings.CutSuffix(s, "%")
	f, err := strconv.ParseFloat(digits, 64)
	if percent {
		f /= 100
	}
	if err != nil || !(f >= 0 && f <= 1) {
		return 0, fmt.Errorf("%q is neither a percentage from 0%% to 100%% nor a part from 0 to 1", s)
	}
	return Portion(f), nil
}

// Route is one route of the table.
type Route = proxy.Route

// isAll tells whether no path is left for another prefix.
func isAll(r Route) bool {
	return r.Prefix == "/" && r.Host == "" && len(r.Methods)+len(r.Headers) == 0
}

func isFirstSegment(r Route) bool { return r.Prefix == proxy.FirstSegmentRule }

// routeText is a route as --route has it, or what it matches and where it leads.
func routeText(r Route) string {
	if isFirstSegment(r) {
		return r.Prefix
	}
	return strings.ReplaceAll(r.String(), ",", `\,`) + "=" + r.Service
}

func parseRoute(s string) (Route, error) {
	if s == proxy.FirstSegmentRule {
		return Route{Prefix: s}, nil
	}
	i := strings.LastIndexByte(s, '=') // a service's name has none
	if i < 0 || !strings.HasPrefix(s, "/") {
		return Route{}, fmt.Errorf("%q is not PREFIX=SERVICE with a PREFIX that starts with /, nor %s", s, proxy.FirstSegmentRule)
	}
	route := Route{Prefix: s[:i], Service: s[i+1:]}
	if err := plainPath(route.Prefix); err != nil {
		return Route{}, fmt.Errorf("%q: its prefix %w", s, err)
	}
	if err := registry.ValidName(route.Service); err != nil {
		return Route{}, fmt.Errorf("%q: its service %w", s, err)
	}
	return route, nil
}

func parseAPI(s string) (API, error) {
	switch a := API(s); a {
	case APIData, APIAdmin, APIBoth:
		return a, nil
	}
	return "", fmt.Errorf("%q is not one of %s, %s, %s", s, APIData, APIAdmin, APIBoth)
}

// parseNetwork reads a network or a single address. An IPv4-mapped one is what it maps, as peers are compared.
func parseNetwork(s string) (netip.Prefix, error) {
	s = strings.TrimSpace(s)
	if ip, err := netip.ParseAddr(s); err == nil && ip.Zone() == "" {
		ip = ip.Unmap()
		return netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	network, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is neither a network (10.0.0.0/8, fd00::/8) nor an address (10.1.2.3, ::1)", s)
	}
	if ip := network.Addr(); ip.Is4In6() && network.Bits() >= 96 {
		network = netip.PrefixFrom(ip.Unmap(), network.Bits()-96)
	}
	return network.Masked(), nil
}

func parseListen(s string) (string, error) {
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", fmt.Errorf("%q is not HOST:PORT or :PORT with a port from 0 to 65535", s)
	}
	return s, nil
}

func parseListenOrOff(s string) (string, error) {
	if s == Off {
		return s, nil
	}
	s, err := parseListen(s)
	if err != nil {
		return "", fmt.Errorf("%w, nor %s", err, Off)
	}
	return s, nil
}

// parseFile refuses the empty name: what was meant to be restricted by that file would not be.
func parseFile(s string) (string, error) {
	if s == "" {
		return "", errors.New("the name of the file is empty")
	}
	return s, nil
}

func parsePath(s string) (string, error) {
	if !strings.HasPrefix(s, "/") {
		return "", fmt.Errorf("%q is not a path: it starts with /", s)
	}
	if err := plainPath(s); err != nil {
		return "", fmt.Errorf("%q %w", s, err)
	}
	return s, nil
}

// parseDirectory takes the name of a directory that is there or may be made.
func parseDirectory(s string) (string, error) {
	if s == "" {
		return "", errors.New("an empty value is no directory: it must be the name of one, which is made if it is not there")
	}
	if info, err := os.Stat(s); err == nil && !info.IsDir() {
		return "", fmt.Errorf("%q is a file: it must be a directory, which is made if it is not there", s)
	}
	return s, nil
}

// plainPath refuses a path that no request has, or that could be read in another way: those requests are refused.
func plainPath(s string) error {
	const without = "?#%;*\\"
	if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(without, r) }) {
		return fmt.Errorf("is not plain: it is visible ASCII without any of %s", without)
	}
	for segment := range strings.SplitSeq(strings.Trim(s, "/"), "/") {
		if segment == "." || segment == ".." {
			return fmt.Errorf("has the segment %s: write the path that it leads to", segment)
		}
	}
	if strings.Contains(s, "//") {
		return errors.New("has an empty segment: write one /")
	}
	return nil
}

// parseMethod takes the methods that are refused unless they are named. Methods are case-sensitive.
func parseMethod(s string) (string, error) {
	if s != "CONNECT" && s != "TRACE" {
		return "", fmt.Errorf("%q is neither CONNECT nor TRACE, the methods that need it", s)
	}
	return s, nil
}

func parseName(s string) (string, error) { return s, registry.ValidName(s) }

func parseURL(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return "", fmt.Errorf("%q is not http://HOST:PORT or https://HOST:PORT", s)
	}
	return u.Scheme + "://" + u.Host, nil
}

func parseAccessLog(s string) (string, error) {
	if s == "" {
		return "", fmt.Errorf("%q is neither a file, nor stdout, nor %s", s, Off)
	}
	return s, nil
}

func parseOTLP(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return "", fmt.Errorf("%q is not http://HOST:PORT or https://HOST:PORT, with a path if the collector has one", s)
	}
	return s, nil
}

// parseToken refuses what no Authorization field can carry. Its error does not show the token.
func parseToken(s string) (string, error) {
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errors.New("a token is visible ASCII without spaces")
	}
	return s, nil
}

func parseStatuses(s string) ([]int, error) {
	var statuses []int
	for word := range strings.SplitSeq(s, ",") {
		status, err := strconv.Atoi(strings.TrimSpace(word))
		if err != nil || status < 400 || status > 599 {
			return nil, fmt.Errorf("%q is not a list of statuses from 400 to 599, separated by commas", s)
		}
		statuses = append(statuses, status)
	}
	return statuses, nil
}

// parseProtocols reads names of protocols as an Upgrade field has them (RFC 9110 section 7.8), or none.
func parseProtocols(s string) ([]string, error) {
	if s == "none" {
		return []string{}, nil
	}
	var protocols []string
	for word := range strings.SplitSeq(s, ",") {
		word = strings.ToLower(strings.TrimSpace(word))
		name, version, versioned := strings.Cut(word, "/")
		if !isToken(name) || versioned && !isToken(version) || name == "none" {
			return nil, fmt.Errorf("%q is not a list of protocols such as websocket or foo/2, separated by commas, nor none", s)
		}
		protocols = append(protocols, word)
	}
	return protocols, nil
}

// isToken: RFC 9110 section 5.6.2.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	})
}

// Authorities are those of a PEM file, whom certificates are believed. The zero value is none that were named.
type Authorities struct {
	File string
	Pool *x509.CertPool
}

func (a Authorities) String() string { return a.File }

func readAuthorities(file string) (Authorities, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return Authorities{}, err // names the file
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return Authorities{}, fmt.Errorf("%s holds no certificate in PEM form", file)
	}
	return Authorities{file, pool}, nil
}

// count reads a whole number that is at least what its flag's min tag says.
func count(ctx *kong.DecodeContext, target reflect.Value) error {
	s, err := popNumber(ctx, "number")
	if err != nil {
		return err
	}
	least, err := strconv.Atoi(ctx.Value.Tag.Get("min"))
	if err != nil {
		return fmt.Errorf("its min tag: %w", err)
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < least {
		return fmt.Errorf("%q is not a whole number of at least %d", s, least)
	}
	target.SetInt(int64(n))
	return nil
}

// units are the powers of 1024 that a size is written in.
var units = []struct {
	name  string
	bytes int64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}}

// size reads a number of bytes that is at most what its flag's max tag says, if it has one.
func size(ctx *kong.DecodeContext, target reflect.Value) error {
	s, err := popNumber(ctx, "size")
	if err != nil {
		return err
	}
	n, err := parseSize(s)
	if err != nil {
		return err
	}
	if tag := ctx.Value.Tag.Get("max"); tag != "" {
		most, err := parseSize(tag)
		if err != nil {
			return fmt.Errorf("its max tag: %w", err)
		}
		if n > most {
			return fmt.Errorf("%q is more than %s", s, tag)
		}
	}
	target.SetInt(n)
	return nil
}

// parseSize reads 4096, 32KiB, 1MiB or 2GiB.
func parseSize(s string) (int64, error) {
	number, unit := s, int64(1)
	for _, u := range units {
		if cut, ok := strings.CutSuffix(s, u.name); ok {
			number, unit = cut, u.bytes
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is not a number of bytes, written like 4096, 32KiB, 1MiB or 2GiB", s)
	}
	return int64(n) * unit, nil
}

// sizeText writes a size as parseSize reads it.
func sizeText(n int64) string {
	for i := len(units) - 1; i >= 0; i-- {
		if u := units[i]; n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// duration reads a time that is at least what its flag's min tag says.
func duration(ctx *kong.DecodeContext, target reflect.Value) error {
	s, err := popNumber(ctx, "duration")
	if err != nil {
		return err
	}
	least, err := time.ParseDuration(ctx.Value.Tag.Get("min"))
	if err != nil {
		return fmt.Errorf("its min tag: %w", err)
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < least {
		return fmt.Errorf("%q is not a time of at least %v, written like 30s, 1m30s or 250ms", s, least)
	}
	target.SetInt(int64(d))
	return nil
}

// popNumber takes the next argument, a negative number too: no flag starts with a digit.
func popNumber(ctx *kong.DecodeContext, what string) (s string, err error) {
	next, _ := ctx.Scan.Peek().Value.(string)
	if len(next) > 1 && next[0] == '-' && next[1] >= '0' && next[1] <= '9' {
		ctx.Scan.Pop()
		return next, nil
	}
	err = ctx.Scan.PopValueInto(what, &s)
	return s, err
}

// list writes alternatives for people: a, b, c.
func list[T ~string](all []T) string {
	words := make([]string, len(all))
	for i, word := range all {
		words[i] = string(word)
	}
	return strings.Join(words, ", ")
}

package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"kerberos/lb"
)

// Parse reads args into a grammar of commands, and what args leave out from the environment; what both leave out of a Gateway,
// from its file. Its errors name the flag, the variable or the line if the value came from one, and what is allowed; they never
// repeat a token. The *Sources are bound for the command.
func Parse(grammar any, args []string, env func(string) (string, bool), options ...kong.Option) (*kong.Context, error) {
	return parseWith(grammar, args, &Sources{env: env}, options...)
}

func parseWith(grammar any, args []string, sources *Sources, options ...kong.Option) (*kong.Context, error) {
	parser, err := kong.New(grammar, append([]kong.Option{
		kong.Name("kerberos"),
		kong.Bind(sources),
		kong.Vars{"strategies": list(lb.Strategies()), "most_tried": strconv.Itoa(lb.MaxTried)},
		kong.Resolvers(kong.ResolverFunc(sources.resolve)),
		kong.Help(help),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, FlagsLast: true, WrapUpperBound: 120}),
		kong.ValueFormatter(describe),
		kong.ExplicitGroups([]kong.Group{
			{Key: "listeners", Title: "Listening and stopping:"},
			{Key: "registry", Title: "Registrations:"},
			{Key: "access", Title: "Who may do what:"},
			{Key: "traffic", Title: "Traffic:"},
			{Key: "logs", Title: "Access log and traces:"},
			{Key: "limits", Title: "Limits (0 is none):"},
		}),
		kong.KindMapper(reflect.Int, kong.MapperFunc(count)),
		kong.TypeMapper(reflect.TypeFor[time.Duration](), kong.MapperFunc(duration)),
		kong.TypeMapper(reflect.TypeFor[lb.Strategy](), text(lb.ParseStrategy)),
		kong.TypeMapper(reflect.TypeFor[API](), text(parseAPI)),
		kong.TypeMapper(reflect.TypeFor[Share](), text(parseShare)),
		kong.TypeMapper(reflect.TypeFor[Portion](), text(parsePortion)),
		kong.TypeMapper(reflect.TypeFor[[]Route](), each(parseRoute)),
		kong.TypeMapper(reflect.TypeFor[[]netip.Prefix](), each(parseNetwork)),
		kong.TypeMapper(reflect.TypeFor[Authorities](), text(readAuthorities)),
		kong.NamedMapper("listen", text(parseListen)),
		kong.NamedMapper("listen-or-off", text(parseListenOrOff)),
		kong.NamedMapper("path", text(parsePath)),
		kong.NamedMapper("access-log", text(parseAccessLog)),
		kong.NamedMapper("otlp", text(parseOTLP)),
		kong.NamedMapper("directory", text(parseDirectory)),
		kong.NamedMapper("file", text(parseFile)),
		kong.NamedMapper("name", text(parseName)),
		kong.NamedMapper("url", text(parseURL)),
		kong.NamedMapper("token", text(parseToken)),
		kong.NamedMapper("status", text(parseStatuses)),
		kong.NamedMapper("methods", each(parseMethod)),
		kong.NamedMapper("size", kong.MapperFunc(size)),
		kong.NamedMapper("protocols", text(parseProtocols)),
	}, options...)...)
	if err != nil {
		return nil, fmt.Errorf("the grammar of the command line: %w", err)
	}
	return parser.Parse(args)
}

// Load reads the configuration of a gateway that runs with args, as Parse does, and where it comes from, which is there beside an
// error too.
func Load(args []string, env func(string) (string, bool)) (Gateway, *Sources, error) {
	var grammar struct {
		Run Gateway `cmd:"" default:"withargs"`
	}
	sources := &Sources{env: env}
	_, err := parseWith(&grammar, args, sources)
	return grammar.Run, sources, err
}

// Defaults is the configuration of a gateway that is told nothing, whatever the environment and the working directory say.
func Defaults() (Gateway, error) {
	var grammar struct {
		Run Gateway `cmd:"" default:"withargs"`
	}
	_, err := parseWith(&grammar, nil, &Sources{env: func(string) (string, bool) { return "", false }, noFile: true})
	return grammar.Run, err
}

// Variables are the names under which a flag is looked up in the environment; the first one that is set wins.
func Variables(flag *kong.Flag) []string {
	if flag.Name == "help" || flag.Tag.Has("noenv") {
		return nil
	}
	names := []string{"KERBEROS_" + strings.ReplaceAll(strings.ToUpper(flag.Name), "-", "_")}
	if also := flag.Tag.Get("also"); also != "" {
		names = append(names, also)
	}
	return names
}

// help shows the default command's flags on the first page too: `kerberos --help` is what people type.
func help(options kong.HelpOptions, ctx *kong.Context) error {
	if ctx.Selected() == nil && ctx.Model.DefaultCmd != nil {
		ctx.Model.Flags = append(ctx.Model.Flags, ctx.Model.DefaultCmd.Flags...)
	}
	return kong.DefaultHelpPrinter(options, ctx)
}

// describe is one line of help: what a flag does, its default and its variables.
func describe(v *kong.Value) string {
	if v.Flag == nil {
		return v.Help
	}
	var more []string
	if v.HasDefault {
		more = append(more, "default "+v.Default)
	}
	for _, name := range Variables(v.Flag) {
		more = append(more, "$"+name)
	}
	if len(more) == 0 {
		return v.Help
	}
	return v.Help + " (" + strings.Join(more, ", ") + ")"
}

// text makes a mapper of a function that parses one value.
func text[T any](parse func(string) (T, error)) kong.MapperFunc {
	return func(ctx *kong.DecodeContext, target reflect.Value) error {
		var s string
		if err := ctx.Scan.PopValueInto("value", &s); err != nil {
			return err
		}
		v, err := parse(s)
		if err != nil {
			return err
		}
		target.Set(reflect.ValueOf(v).Convert(target.Type()))
		return nil
	}
}

// each makes a mapper of a function that parses one value of a list separated by commas. An empty list is none of the
// values, and not what leaving out the flag means: who writes --addr-allow "$NETWORKS" wants to know that there are none.
func each[T any](parse func(string) (T, error)) kong.MapperFunc {
	return func(ctx *kong.DecodeContext, target reflect.Value) error {
		var s string
		if err := ctx.Scan.PopValueInto("value", &s); err != nil {
			return err
		}
		words := kong.SplitEscaped(s, ',')
		if len(words) == 0 {
			words = []string{""}
		}
		for _, word := range words {
			v, err := parse(word)
			if err != nil {
				return err
			}
			target.Set(reflect.Append(target, reflect.ValueOf(v)))
		}
		return nil
	}
}
